"""Matrix products of which each row depends on that row alone, bit for bit. A vendor's library does not promise that.

A program makes one tile of the result, from one segment of the inputs or from all of them; `add_segments` adds
those that were made apart, in the order in which a program adds its own. So the same sums are made, in the same
order, whatever the number of rows (`matmul_tiles`). Rows and columns beyond the end are zeros that nobody keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.architectures import capability
from kernels.gpu.matmul_tiles import Tile, segments_for, tile_for, tiles_for
from kernels.gpu.segments import add_segments
from kernels.weights import PackedWeight

TOGETHER = 8  # tiles of rows whose programs follow each other, so that they find the weight in the L2 cache


@triton.jit
def tile_of(number, row_tiles, column_tiles, TOGETHER: tl.constexpr):
    """(row tile, column tile) of a program: TOGETHER row tiles go through all columns, then the next ones."""
    several = number // (TOGETHER * column_tiles)
    rows_there = tl.minimum(row_tiles - several * TOGETHER, TOGETHER)
    within = number % (TOGETHER * column_tiles)
    return several * TOGETHER + within % rows_there, within // rows_there


@triton.jit
def accumulate(
    acc, x, weight, first, last, inputs, held_rows, held_columns, WHOLE: tl.constexpr, DEPTH: tl.constexpr
):
    """acc [ROWS, COLUMNS] plus the products over the blocks of inputs from `first` until `last`.
    x: pointers [ROWS, DEPTH], weight: pointers [DEPTH, COLUMNS], both at input 0. WHOLE: no block is cut short."""
    lane = tl.arange(0, DEPTH)
    for block in range(first, last):
        start = block * DEPTH
        if WHOLE:
            a = tl.load(x + start, mask=held_rows, other=0.0)
            b = tl.load(weight + start, mask=held_columns, other=0.0)
        else:
            inside = start + lane < inputs
            a = tl.load(x + start, mask=held_rows & inside[None, :], other=0.0)
            b = tl.load(weight + start, mask=held_columns & inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens"])
def matmul_kernel(
    x, weight, bias, out, x_stride, weight_stride, tokens, inputs, outputs,
    SEGMENTS: tl.constexpr, APART: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out [tokens, outputs] = x · weightᵀ + bias. APART: out [SEGMENTS, tokens, outputs] fp32, a segment each, and
    no bias. bias None: there is none."""
    row_tiles, column_tiles = tl.cdiv(tokens, ROWS), tl.cdiv(outputs, COLUMNS)
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, TOGETHER)
    first_row, first_column = row_tile.to(tl.int64) * ROWS, column_tile.to(tl.int64) * COLUMNS

    row, column, lane = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    held_rows = (row < tokens - first_row)[:, None]
    held_columns = (column < outputs - first_column)[None, :]
    x += first_row * x_stride + row[:, None] * x_stride + lane[None, :]
    weight += first_column * weight_stride + column[None, :] * weight_stride + lane[:, None]
    blocks = tl.cdiv(inputs, DEPTH)
    each = tl.cdiv(blocks, SEGMENTS)
    out += first_row * outputs + first_column
    zeros = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)

    if APART:
        segment = tl.program_id(1)
        first, last = segment * each, tl.minimum((segment + 1) * each, blocks)
        total = accumulate(zeros, x, weight, first, last, inputs, held_rows, held_columns, WHOLE, DEPTH)
        out += segment.to(tl.int64) * tokens * outputs
    elif SEGMENTS == 1:
        total = accumulate(zeros, x, weight, 0, blocks, inputs, held_rows, held_columns, WHOLE, DEPTH)
    else:
        total = zeros
        for segment in range(SEGMENTS):
            first, last = segment * each, tl.minimum((segment + 1) * each, blocks)
            total += accumulate(zeros, x, weight, first, last, inputs, held_rows, held_columns, WHOLE, DEPTH)
    if bias is not None:
        gain = tl.load(bias + first_column + column[None, :], mask=held_columns, other=0.0)
        total += gain.to(tl.float32)
    place = row[:, None] * outputs + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=held_rows & held_columns)


def matmul(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    assert isinstance(weight, Tensor)  # this set packs none
    tokens, (outputs, inputs) = x.shape[0], weight.shape
    tile = tile_for(tiles_for(capability(x.device), x.dtype), tokens, inputs, outputs)
    programs = triton.cdiv(tokens, tile.rows) * triton.cdiv(outputs, tile.columns)
    return tiled(x, weight, bias, tile, apart=programs < tile.enough)


def tiled(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, *, apart: bool) -> Tensor:
    """The product in tiles of that size. `apart`: the segments by programs of their own. Neither changes a bit."""
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    segments = segments_for(inputs, outputs)
    apart = apart and segments > 1
    made = out
    if apart:
        made = torch.empty((segments, tokens, outputs), dtype=torch.float32, device=x.device)
    grid = (
        triton.cdiv(tokens, tile.rows) * triton.cdiv(outputs, tile.columns),
        segments if apart else 1,
    )
    matmul_kernel[grid](
        x, weight, None if apart else bias, made, x.stride(0), weight.stride(0), tokens, inputs, outputs,
        SEGMENTS=segments, APART=apart, WHOLE=inputs % tile.depth == 0,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, TOGETHER=TOGETHER,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if apart:
        add_segments(made, bias, out)
    return out
