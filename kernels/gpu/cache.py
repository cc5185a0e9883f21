"""Storing K and V in their pages, in 8 bits where the cache has them: one token per program and some kv heads.

K lies by token, as V does (`PagedKV`): when its channels lay apart, each number of a new token went to a sector of
memory of its own, and storing 256 tokens took 4.3 % of a decoding step of nano-vllm's benchmark on an H200; now it
takes 1.3 %.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import PagedKV
from kernels.attending import LIMITS

BLOCK = 2048  # channels of a program


@triton.jit
def _quantised(x, LIMIT: tl.constexpr):
    """x [HEADS, BLOCK_D] fp32 → what 8 bits must hold, in fp32 but for the cast, and scales [HEADS] bfloat16.

    By the rule of the contract: the scale is max|x| / LIMIT, rounded up to bfloat16. Divisions are exactly
    rounded, so that every set stores the same bits.
    """
    largest = tl.max(tl.abs(x), axis=1)
    # NaN or infinity; NaN is what a maximum may pass over
    failed = tl.max((x * 0.0 != 0.0).to(tl.int32), axis=1) != 0
    exact = tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32))
    # the upper 16 bits of an fp32 are a bfloat16: round up, also from what the division has lost to 0
    bits = (exact.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    bits = tl.where(largest == 0.0, 0, tl.maximum(bits, 1))
    bits = tl.where(failed, 0x7FC0, bits)  # NaN
    scales = (bits << 16).to(tl.float32, bitcast=True)
    usable = (scales > 0.0)[:, None]
    ratio = tl.where(usable, tl.div_rn(x, tl.where(usable, scales[:, None], 1.0) + tl.zeros_like(x)), 0.0)
    if LIMIT == 127.0:
        ratio = (ratio + 12582912.0) - 12582912.0  # adding 1.5 · 2^23 rounds to nearest even
    return ratio, bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def store(
    x, pages, scales, slot, head, channel, inside,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Heads x [HEADS, BLOCK_D] of K or V of a token, in its slot of `pages`. slot int64: offsets into the pool go
    beyond 2^31. LIMIT None: the cache has the dtype of x, and no scales."""
    block, within = slot // PAGE * KV_HEADS + head, slot % PAGE  # block: which [page_size, d] of the pool
    if LIMIT is not None:
        x, rounded = _quantised(x.to(tl.float32), LIMIT)
        tl.store(scales + block * PAGE + within, rounded, mask=head < KV_HEADS)
    place = block[:, None] * (DIM * PAGE) + within * DIM + channel
    tl.store(pages + place, x.to(pages.dtype.element_ty), mask=inside)


@triton.jit
def fails(v):
    """[HEADS, 1]: whether a head of v [HEADS, BLOCK_D] has NaN or infinity. It is stored as zeros, its k as NaN."""
    return tl.max((v.to(tl.float32) * 0.0 != 0.0).to(tl.int32), axis=1)[:, None] != 0


@triton.jit
def replaced(x, failed, by):
    """x [HEADS, BLOCK_D], and `by` where a head `failed`; in fp32, since the interpreter has no bf16 of a number."""
    return tl.where(failed, by, x.to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def store_kv_kernel(
    k, v, keys, values, key_scales, value_scales, slots, k_stride, k_head_stride, v_stride, v_head_stride,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, LIMIT: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs [T, blocks of HEADS kv heads]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < KV_HEADS)[:, None] & (channel < DIM)
    x = tl.load(k + token * k_stride + head[:, None] * k_head_stride + channel, mask=inside, other=0.0)
    y = tl.load(v + token * v_stride + head[:, None] * v_head_stride + channel, mask=inside, other=0.0)
    failed = fails(y)
    x, y = replaced(x, failed, float("nan")), replaced(y, failed, 0.0)
    store(x, keys, key_scales, slot, head, channel, inside, KV_HEADS, DIM, PAGE, LIMIT)
    store(y, values, value_scales, slot, head, channel, inside, KV_HEADS, DIM, PAGE, LIMIT)


def pages_of(cache: PagedKV) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What kernels take of a cache. Raises `ValueError` where K is not a view of [pages, hk, page_size, d]."""
    if cache.keys.stride(2) != 1:
        raise ValueError("the triton kernels take keys whose channels lie side by side (keys_by_token)")
    return cache.keys, cache.values, cache.key_scales, cache.value_scales


def store_kv(k: Tensor, v: Tensor, cache: PagedKV, slots: Tensor) -> None:
    tokens, kv_heads, dim = k.shape
    if not tokens:
        return
    block = triton.next_power_of_2(dim)
    heads = max(1, min(BLOCK // block, triton.next_power_of_2(kv_heads)))
    store_kv_kernel[(tokens, triton.cdiv(kv_heads, heads))](
        k, v, *pages_of(cache), slots,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        KV_HEADS=kv_heads, DIM=dim, PAGE=cache.keys.shape[3], LIMIT=LIMITS.get(cache.keys.dtype),
        HEADS=heads, BLOCK_D=block,
    )  # fmt: skip
