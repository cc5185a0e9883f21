"""Products with weights of 8 bits, which stay so: x is rounded to fp8 as it comes, row by row, then multiplied.

`quantise_rows` finds the scales of x: one for each row, or, for weights with a scale for each block, one for each row
and 128 inputs. Weights with a scale for each output go to the library's scaled product where the device has one
(`library`) and there are many tokens; `fp8_kernel` does all others: few tokens, for which the library is no faster
than with bf16 (16 rows of an 8B shape on an H200: 5.4 ms a step, this kernel with blocks 4.2, bf16 5.3), blocks,
fp16, and `invariant` products, for which it has one tile. It adds 128 inputs at a time in the tensor cores, which
keep some 13 bits of a sum, then in fp32, and of few tokens segments of the inputs by programs of their own. Its
tiles are estimates.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.int4_matmul import segments_for
from kernels.gpu.matmul import add_segments
from kernels.weights import BLOCK, Float8Weight

LIMIT = 448.0  # largest number in E4M3
FEW_TOKENS = 32


@triton.jit
def quantise_kernel(
    x, floats, scales, x_stride, inputs, groups, WIDTH: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    """floats [tokens, inputs], scales [tokens, groups] of WIDTH inputs each; a program makes one of them, BLOCK
    inputs at a time. NaN and infinity make the scale NaN."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += token * x_stride
    floats += token * inputs
    lane = tl.arange(0, BLOCK)
    first, last = group * WIDTH, tl.minimum((group + 1) * WIDTH, inputs)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    failed = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(first, last, BLOCK):
        value = tl.abs(tl.load(x + start + lane, mask=start + lane < last, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, value)
        failed |= (value < float("inf")).to(tl.int32) ^ 1
    # divisions are exactly rounded: otherwise numbers in the middle of two in fp8 go elsewhere than in the reference
    scale = tl.div_rn(tl.max(largest, axis=0), tl.full((), LIMIT, tl.float32))
    reach = tl.where(scale > 0, tl.div_rn(tl.full((), 1.0, tl.float32), scale), 0.0)
    tl.store(scales + token * groups + group, tl.where(tl.max(failed, axis=0) > 0, float("nan"), scale))
    for start in range(first, last, BLOCK):
        inside = start + lane < last
        value = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32) * reach
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
        tl.store(floats + start + lane, value.to(tl.float8e4nv), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def fp8_kernel(
    x, x_scales, weight, scales, bias, out, tokens, inputs, outputs,
    SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [tokens, outputs], or [SEGMENTS, tokens, outputs] fp32, a part of the inputs each. BLOCKS: x_scales
    [tokens, ⌈inputs / 128⌉], scales [⌈outputs / 128⌉, ⌈inputs / 128⌉]; else x_scales [tokens, 1], scales [outputs].
    COLUMNS divides 128."""
    row_tiles, blocks = tl.cdiv(tokens, ROWS), tl.cdiv(inputs, 128)
    first_row = (tl.program_id(0) % row_tiles).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) // row_tiles).to(tl.int64) * COLUMNS
    row, column, lane = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, 128)
    held_rows, held_columns = row < tokens - first_row, column < outputs - first_column
    x += first_row * inputs + row[:, None] * inputs + lane[None, :]
    weight += first_column * inputs + column[None, :] * inputs + lane[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    each, segment = tl.cdiv(blocks, SEGMENTS), tl.program_id(1)
    for block in range(segment * each, tl.minimum((segment + 1) * each, blocks)):
        start = block * 128
        inside = lane < inputs - start
        a = tl.load(x + start, mask=held_rows[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight + start, mask=held_columns[None, :] & inside[:, None], other=0.0)
        part = tl.dot(a, b)
        if BLOCKS:
            x_scale = tl.load(x_scales + (first_row + row) * blocks + block, mask=held_rows, other=0.0)
            part *= x_scale[:, None] * tl.load(scales + first_column // 128 * blocks + block)
        total += part
    if not BLOCKS:
        x_scale = tl.load(x_scales + first_row + row, mask=held_rows, other=0.0)
        scale = tl.load(scales + first_column + column, mask=held_columns, other=0.0)
        total *= x_scale[:, None] * scale[None, :]
    if bias is not None:
        total += tl.load(bias + first_column + column, mask=held_columns, other=0.0).to(tl.float32)[None, :]
    out += segment.to(tl.int64) * tokens * outputs
    place = (first_row + row)[:, None] * outputs + (first_column + column)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=held_rows[:, None] & held_columns[None, :])


def fp8_matmul(x: Tensor, weight: Float8Weight, bias: Tensor | None, *, invariant: bool = False) -> Tensor:
    outputs, inputs = weight.shape
    out = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    if not x.shape[0]:
        return out
    floats, x_scales = quantise_rows(x, BLOCK if weight.blocks else inputs)
    few = x.shape[0] <= FEW_TOKENS and not invariant
    fits = not (few or invariant or weight.blocks or inputs % 16 or outputs % 16)
    if library(x.device, x.dtype) and fits:
        return torch._scaled_mm(
            floats,
            weight.floats.t(),
            scale_a=x_scales,
            scale_b=weight.scales[None],
            bias=bias,
            out_dtype=x.dtype,
        )
    rows, columns, stages = (16, 64, 4) if few else (64, 128, 3)
    segments = segments_for(triton.cdiv(inputs, BLOCK), outputs) if few else 1
    made = out
    if segments > 1:
        made = torch.empty((segments, x.shape[0], outputs), dtype=torch.float32, device=x.device)
    fp8_kernel[(triton.cdiv(x.shape[0], rows) * triton.cdiv(outputs, columns), segments)](
        floats, x_scales, weight.floats, weight.scales, bias if segments == 1 else None, made,
        x.shape[0], inputs, outputs,
        SEGMENTS=segments, BLOCKS=weight.blocks, ROWS=rows, COLUMNS=columns, num_warps=4, num_stages=stages,
    )  # fmt: skip
    if segments > 1:
        add_segments(made, bias, out)
    return out


def quantise_rows(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """x `[T, in]` → E4M3 `[T, in]` and fp32 scales `[T, ⌈in / width⌉]`."""
    tokens, inputs = x.shape
    groups = triton.cdiv(inputs, width)
    floats = torch.empty((tokens, inputs), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((tokens, groups), dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(width))
    quantise_kernel[(tokens, groups)](
        x, floats, scales, x.stride(0), inputs, groups,
        WIDTH=width, LIMIT=LIMIT, BLOCK=block, num_warps=1 if block <= 256 else 4,
    )  # fmt: skip
    return floats, scales


@cache
def library(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a product of fp8 with a scale for each row and output there: tried once, in a first step,
    which no graph captures."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    one = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(one, one.t(), scale_a=scale, scale_b=scale.t(), out_dtype=dtype)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True
