"""What lies between the product of q, k and v and attention, in one launch: norms of heads, rotation, storing.

Some heads of one token per program, of q, of k or of v. A head is rounded to the dtype after its norm and after its
rotation, and every step has the formula, the shape of blocks and the order of sums of the kernel that does it alone.
No argument but the grid depends on the number of tokens: no step compiles anew.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import HeadNorms, PagedKV
from kernels.attending import LIMITS
from kernels.gpu.cache import fails, pages_of, replaced, store
from kernels.gpu.norm import inverse_rms
from kernels.gpu.rope import rotated

BLOCK = 1024  # channels of a program: 8 for each of its threads


@triton.jit
def _normed_and_rotated(
    x, weight, cos, sin, eps, offset, inside, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Heads [HEADS, BLOCK_D] that begin at x [HEADS, 1]. The first 2 · HALF channels are rotated; a thread loads the
    other channel of each pair itself. weight None: no norm."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    values = tl.load(x + channel, mask=inside, other=0.0)
    first, paired = channel < HALF, channel < 2 * HALF
    partner, angle = tl.where(first, channel + HALF, channel - HALF), tl.where(first, channel, channel - HALF)
    others = values
    if HALF:
        others = tl.load(x + partner, mask=inside & paired, other=0.0)
    if weight is not None:
        scale = inverse_rms(values.to(tl.float32), DIM, eps)
        gain = tl.load(weight + channel, mask=channel < DIM, other=0.0).to(tl.float32) + offset
        values = (values.to(tl.float32) * scale * gain).to(values.dtype)
        if HALF:
            gain = tl.load(weight + partner, mask=paired, other=0.0).to(tl.float32) + offset
            others = (others.to(tl.float32) * scale * gain).to(values.dtype)
    if HALF:
        c, s = tl.load(cos + angle, mask=paired, other=0.0), tl.load(sin + angle, mask=paired, other=0.0)
        turned = rotated(values.to(tl.float32), others.to(tl.float32), c, tl.where(first, -s, s))
        values = tl.where(paired, turned.to(values.dtype), values)
    return values


@triton.jit(do_not_specialize_on_alignment=["slots"])
def norm_rope_store_kernel(
    q, k, v, q_weight, k_weight, cos, sin, keys, values, key_scales, value_scales, slots,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, eps, offset,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    LIMIT: tl.constexpr, Q_BLOCKS: tl.constexpr, KV_BLOCKS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs [T, Q_BLOCKS + 2 · KV_BLOCKS], of HEADS heads each. cos and sin [T, HALF] fp32, contiguous; with
    HALF 0, None: nothing is rotated. q_weight and k_weight None: no norms. Q_BLOCKS 0: q stays as it is."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK_D)[None, :]
    if HALF:
        cos += token * HALF
        sin += token * HALF
    if block < Q_BLOCKS:
        head = block * HEADS + tl.arange(0, HEADS)
        inside = (head < Q_HEADS)[:, None] & (channel < DIM)
        x = q + token * q_stride + head[:, None] * q_head_stride
        y = _normed_and_rotated(x, q_weight, cos, sin, eps, offset, inside, DIM, HALF, BLOCK_D)
        tl.debug_barrier()  # in place: other threads have read what this one overwrites
        tl.store(x + channel, y, mask=inside)
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            head = (block - Q_BLOCKS) % KV_BLOCKS * HEADS + tl.arange(0, HEADS)
            inside = (head < KV_HEADS)[:, None] & (channel < DIM)
            value = tl.load(
                v + token * v_stride + head[:, None] * v_head_stride + channel, mask=inside, other=0.0
            )
            failed = fails(value)
            if block < Q_BLOCKS + KV_BLOCKS:
                x = k + token * k_stride + head[:, None] * k_head_stride
                y = _normed_and_rotated(x, k_weight, cos, sin, eps, offset, inside, DIM, HALF, BLOCK_D)
                y = replaced(y, failed, float("nan"))
                store(y, keys, key_scales, slot, head, channel, inside, KV_HEADS, DIM, PAGE, LIMIT)
            else:
                y = replaced(value, failed, 0.0)
                store(y, values, value_scales, slot, head, channel, inside, KV_HEADS, DIM, PAGE, LIMIT)


def norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor] | None,
    cache: PagedKV,
    slots: Tensor,
) -> None:
    tokens, heads, dim = q.shape
    if not tokens:
        return
    kv_heads = k.shape[1]
    cos, sin = (None, None) if rotation is None else rotation
    half = 0 if cos is None else cos.shape[1]
    block = triton.next_power_of_2(dim)
    at_once = max(1, BLOCK // block)
    q_blocks = triton.cdiv(heads, at_once) if norms is not None or half else 0
    kv_blocks = triton.cdiv(kv_heads, at_once)
    norm_rope_store_kernel[(tokens, q_blocks + 2 * kv_blocks)](
        q, k, v, None if norms is None else norms.q, None if norms is None else norms.k, cos, sin,
        *pages_of(cache), slots,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        0.0 if norms is None else float(norms.eps), 0.0 if norms is None else float(norms.offset),
        Q_HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=half, PAGE=cache.keys.shape[3],
        LIMIT=LIMITS.get(cache.keys.dtype), Q_BLOCKS=q_blocks, KV_BLOCKS=kv_blocks, HEADS=at_once, BLOCK_D=block,
    )  # fmt: skip
