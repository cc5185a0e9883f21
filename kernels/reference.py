"""The truth: every operation of the contract in plain torch, on any device and dtype.

Owns readability; speed is for the other sets, which are tested against this one. Knows no C and no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import Kernels

MAX_SCORES = 2**25  # attention scores held at once, so that long contexts need no memory of their own


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    # x·rsqrt(mean) row by row: the mean runs over the last dimension only
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    for x in (q, k):
        first, second = x.float().chunk(2, dim=-1)  # [T, h, d/2] each
        c, s = cos[:, None, :], sin[:, None, :]
        x.copy_(torch.cat((first * c - second * s, second * c + first * s), dim=-1))


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    page_size = k_cache.shape[3]
    kept = slots >= 0
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    k_cache[page, :, :, offset] = k[kept]  # [n, hk, d] into K transposed
    v_cache[page, :, offset] = v[kept]


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, _, page_size = k_cache.shape
    group = num_heads // num_kv_heads
    starts, lens = query_start.tolist(), context_lens.tolist()
    for row, length in enumerate(lens):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        pages = page_table[row, : -(-length // page_size)].long()
        # cut to the context before any arithmetic: what lies beyond may be NaN
        k = k_cache[pages].permute(1, 0, 3, 2).reshape(num_kv_heads, -1, head_dim)[:, :length].float()
        v = v_cache[pages].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length].float()
        slice_len = max(1, MAX_SCORES // (num_heads * length))
        for first in range(start, end, slice_len):
            last = min(first + slice_len, end)
            queries = q[first:last].float().reshape(last - first, num_kv_heads, group, head_dim)
            scores = torch.einsum("nhgd,hld->nhgl", queries, k) * scale  # [n, hk, group, length]
            position = torch.arange(length - (end - first), length - (end - last), device=q.device)
            hidden = torch.arange(length, device=q.device)[None, :] > position[:, None]  # [n, length]
            scores.masked_fill_(hidden[:, None, None, :], float("-inf"))
            mixed = torch.einsum("nhgl,hld->nhgd", torch.softmax(scores, dim=-1), v)
            out[first:last] = mixed.reshape(last - first, num_heads, head_dim).to(q.dtype)
    return out


KERNELS = Kernels(
    name="reference",
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rope=rope,
    store_kv=store_kv,
    silu_mul=silu_mul,
    paged_attention=paged_attention,
)
