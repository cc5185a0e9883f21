"""Rotary positions, in place: some heads of one token per program, of q or of k."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # pairs of channels of a program


@triton.jit
def rotated(x, other, c, s):
    """x · c + other · s, fp32. Said as one rounding after another, so that a compiler has no choice which product it
    fuses with the sum, and all kernels have the same bits."""
    return tl.fma(x, c, other * s)


@triton.jit
def _rotate(x, stride, head_stride, heads, block, c, s, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """HEADS heads of a token, from `block · HEADS` on. c and s [1, HALF]: of the token."""
    token = tl.program_id(0).to(tl.int64)
    head, channel = block * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (channel < half)
    place = x + token * stride + head * head_stride + channel
    first = tl.load(place, mask=inside).to(tl.float32)  # [HEADS, HALF]
    second = tl.load(place + half, mask=inside).to(tl.float32)
    tl.store(place, rotated(first, second, c, -s).to(x.dtype.element_ty), mask=inside)
    tl.store(place + half, rotated(second, first, c, s).to(x.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    q, k, cos, sin, q_stride, q_head_stride, k_stride, k_head_stride, heads, kv_heads, half, q_blocks,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Programs [T, q_blocks + blocks of k]. cos and sin [T, half] fp32, contiguous."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token * half + channel, mask=channel < half)
    s = tl.load(sin + token * half + channel, mask=channel < half)
    if block < q_blocks:
        _rotate(q, q_stride, q_head_stride, heads, block, c, s, half, HEADS, HALF)
    else:
        _rotate(k, k_stride, k_head_stride, kv_heads, block - q_blocks, c, s, half, HEADS, HALF)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    tokens, heads, dim = q.shape
    kv_heads, half = k.shape[1], dim // 2
    if not tokens:
        return
    wide = triton.next_power_of_2(half)
    at_once = max(1, min(BLOCK // wide, triton.next_power_of_2(heads)))
    q_blocks = triton.cdiv(heads, at_once)
    rope_kernel[(tokens, q_blocks + triton.cdiv(kv_heads, at_once))](
        q, k, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), heads, kv_heads, half, q_blocks,
        HEADS=at_once, HALF=wide,
    )  # fmt: skip
