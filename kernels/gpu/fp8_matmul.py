"""Products with weights of 8 bits, which stay in 8 bits in memory: x is rounded to fp8 row by row, then multiplied.

`quantise_rows` finds the scales of x: one for each row, or, for weights with a scale for each block, one for each row
and 128 inputs. Weights with a scale for each output go to the library's scaled product where the device has one
(`library`) and there are many tokens. `fp8_kernel` does all others: few tokens, for which the library is no faster
than with bf16 (16 rows of an 8B shape on an H200: 5.4 ms a step, this kernel with blocks 4.2, bf16 5.3); weights with
a scale for each block; fp16; and `invariant` products, for which it has one tile. The tensor cores sum 128 inputs at
a time and keep some 13 bits of that; these sums are added in fp32. Where tiles are few, segments of the inputs are
made by programs of their own. Tiles are those measured with 64, 256 and 8,192 tokens and the shapes of an 8B model on
an H200.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attending import LIMITS
from kernels.gpu.architectures import capability
from kernels.gpu.quantised_tiles import PROGRAMS, Tile, segments_for
from kernels.gpu.segments import add_segments, power_of_two
from kernels.weights import BLOCK, Float8Weight

LIMIT = LIMITS[torch.float8_e4m3fn]  # the largest number in E4M3
FEW_TOKENS, SOME_TOKENS = 32, 256
FEW, SOME, MANY = Tile(16, 64, 4, 4), Tile(64, 128, 4, 4), Tile(128, 128, 8, 4)
MOST_SEGMENTS = 4  # of more than few tokens


@triton.jit
def quantise_kernel(
    x, floats, scales, x_stride, inputs, groups,
    WIDTH: tl.constexpr, LIMIT: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """floats [tokens, inputs], scales [tokens, groups] of WIDTH inputs each; a program makes GROUPS of them, BLOCK
    inputs of each at a time. NaN and infinity make the scale NaN."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    x += token * x_stride
    floats += token * inputs
    first, lane = (group * WIDTH)[:, None], tl.arange(0, BLOCK)[None, :]
    last = tl.minimum(first + WIDTH, inputs)
    largest = tl.zeros((GROUPS, BLOCK), dtype=tl.float32)
    failed = tl.zeros((GROUPS, BLOCK), dtype=tl.int32)
    for start in range(0, WIDTH, BLOCK):
        place = first + start + lane
        value = tl.abs(tl.load(x + place, mask=place < last, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, value)
        failed |= (value < float("inf")).to(tl.int32) ^ 1
    # divisions are exactly rounded: otherwise numbers in the middle of two in fp8 go elsewhere than in the reference
    scale = tl.div_rn(tl.max(largest, axis=1), tl.full((GROUPS,), LIMIT, tl.float32))
    reach = tl.where(scale > 0, tl.div_rn(tl.full((GROUPS,), 1.0, tl.float32), scale), 0.0)
    scale = tl.where(tl.max(failed, axis=1) > 0, float("nan"), scale)
    tl.store(scales + token * groups + group, scale, mask=group < groups)
    for start in range(0, WIDTH, BLOCK):
        place = first + start + lane
        value = tl.load(x + place, mask=place < last, other=0.0).to(tl.float32) * reach[:, None]
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
        tl.store(floats + place, value.to(tl.float8e4nv), mask=place < last)


@triton.jit
def accumulate_fp8(
    total, x, x_scales, weight, scales, first, last, inputs, held_rows, held_columns, BLOCKS: tl.constexpr
):
    """total [ROWS, COLUMNS] plus the products over the blocks `first` until `last`, of 128 inputs each. Pointers: x
    [ROWS, 128] and weight [128, COLUMNS], at input 0; where BLOCKS, x_scales [ROWS] and scales, one, at block 0."""
    lane = tl.arange(0, 128)
    for block in range(first, last):
        start = block * 128
        inside = lane < inputs - start
        a = tl.load(x + start, mask=held_rows[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight + start, mask=held_columns[None, :] & inside[:, None], other=0.0)
        part = tl.dot(a, b)
        if BLOCKS:
            x_scale = tl.load(x_scales + block, mask=held_rows, other=0.0)
            part *= x_scale[:, None] * tl.load(scales + block)
        total += part
    return total


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
    each, segment = tl.cdiv(blocks, SEGMENTS), tl.program_id(1)
    total = accumulate_fp8(
        tl.zeros((ROWS, COLUMNS), dtype=tl.float32),
        x, x_scales + (first_row + row) * blocks, weight, scales + first_column // 128 * blocks,
        segment * each, tl.minimum((segment + 1) * each, blocks), inputs, held_rows, held_columns, BLOCKS,
    )  # fmt: skip
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
    (outputs, inputs), tokens = weight.shape, x.shape[0]
    if not tokens:
        return torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    floats, x_scales = quantise_rows(x, BLOCK if weight.blocks else inputs)
    few = tokens <= FEW_TOKENS and not invariant
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
    tile = FEW if few else SOME if invariant or tokens <= SOME_TOKENS else MANY
    blocks, segments = triton.cdiv(inputs, BLOCK), 1
    if few:
        segments = segments_for(blocks, outputs)
    elif not invariant:
        tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(outputs, tile.columns)
        segments = power_of_two(min(MOST_SEGMENTS, blocks, PROGRAMS // tiles))
    return fp8_tiled(floats, x_scales, weight, bias, x.dtype, tile, segments)


def fp8_tiled(
    floats: Tensor,
    x_scales: Tensor,
    weight: Float8Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    segments: int,
) -> Tensor:
    """The product in tiles of that size, each segment by programs of its own; floats and x_scales: x as
    `quantise_rows` has left it."""
    (tokens, inputs), outputs = floats.shape, weight.shape[0]
    out = torch.empty((tokens, outputs), dtype=dtype, device=floats.device)
    made = out
    if segments > 1:
        made = torch.empty((segments, tokens, outputs), dtype=torch.float32, device=floats.device)
    tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(outputs, tile.columns)
    fp8_kernel[(tiles, segments)](
        floats, x_scales, weight.floats, weight.scales, bias if segments == 1 else None, made,
        tokens, inputs, outputs,
        SEGMENTS=segments, BLOCKS=weight.blocks, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        num_stages=tile.stages if capability(floats.device)[0] in (9, 10) else min(tile.stages, 3),  # or too large
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
    together = max(1, min(1024 // block, triton.next_power_of_2(groups)))
    quantise_kernel[(tokens, triton.cdiv(groups, together))](
        x, floats, scales, x.stride(0), inputs, groups,
        WIDTH=width, LIMIT=LIMIT, GROUPS=together, BLOCK=block, num_warps=4,
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
