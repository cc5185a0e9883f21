"""Products of groups of rows, each group with a weight of its own, in one launch.

Owns which program makes which tile. Knows no experts and no routing. How many rows a group has is on the device
alone, so there are as many programs as any sizes may need, and those without rows leave. A row's bits depend on that
row alone, as in `matmul`: its sum is one chain over the inputs in blocks of one depth, in any tile of its table.
Floats of 4 bits take the tiles of plain weights, in which nothing spills on sm_90; they were not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.architectures import capability
from kernels.gpu.float4 import BLOCK_WORDS, SHARED_INPUTS, WORD_INPUTS, accumulate_float4
from kernels.gpu.groups import rows_of
from kernels.gpu.matmul import TOGETHER, accumulate, tile_of
from kernels.gpu.matmul_tiles import Tile, tile_for, tiles_for
from kernels.weights import Float4Weight


@triton.jit(do_not_specialize=["row_tiles"])
def grouped_kernel(
    x, sources, weight, scales, bias, starts, out, x_stride, row_tiles, groups, inputs, outputs,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out [N, outputs]: rows starts[g] until starts[g + 1] are x · weight[g]ᵀ + bias[g]; weight [groups, outputs,
    inputs], bias [groups, outputs] or None: there is none. Row i takes row sources[i] of x; sources None: row i.
    scales: those of a `Float4Weight`, whose words `weight` has then; None: it is plain.
    Programs: row_tiles, as `groups` has them, · column tiles."""
    tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(outputs, COLUMNS), TOGETHER)
    first_column = column_tile.to(tl.int64) * COLUMNS
    group, first_row, end = rows_of(tile, starts, groups, ROWS)
    if first_row >= end:
        return

    row, column, lane = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    held_rows, held_columns = (row < end)[:, None], (column < outputs - first_column)[None, :]
    source = row
    if sources is not None:
        source = tl.load(sources + row, mask=row < end, other=0)
    x += source.to(tl.int64)[:, None] * x_stride + lane[None, :]
    zeros = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if scales is None:
        weight += (group.to(tl.int64) * outputs + first_column) * inputs
        weight += column[None, :] * inputs + lane[:, None]
        total = accumulate(
            zeros, x, weight, 0, tl.cdiv(inputs, DEPTH), inputs, held_rows, held_columns, WHOLE, DEPTH
        )
    else:
        blocks = inputs // SHARED_INPUTS
        first = group.to(tl.int64) * blocks * outputs + first_column
        word, shared = tl.arange(0, DEPTH // WORD_INPUTS), tl.arange(0, DEPTH // SHARED_INPUTS)
        weight += first * BLOCK_WORDS
        weight += ((word // BLOCK_WORDS)[:, None] * outputs + column[None, :]) * BLOCK_WORDS
        weight += (word % BLOCK_WORDS)[:, None]
        scales += first + shared[:, None] * outputs + column[None, :]
        total = accumulate_float4(
            zeros, x, weight, scales, blocks, outputs, held_rows, held_columns, WHOLE, DEPTH
        )
    if bias is not None:
        bias += group.to(tl.int64) * outputs + first_column
        total += tl.load(bias + column[None, :], mask=held_columns, other=0.0).to(tl.float32)
    place = row.to(tl.int64)[:, None] * outputs + first_column + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=held_rows & held_columns)


def grouped_matmul(
    x: Tensor, weight: Tensor | Float4Weight, bias: Tensor | None, sources: Tensor | None, starts: Tensor
) -> Tensor:
    """`[N, out]`: of N rows, in groups that begin at `starts` `[G + 1]` int32, each x · weight[g]ᵀ + bias[g], weight
    `[G, out, in]` and bias `[G, out]` contiguous. `sources` `[N]` int32: the rows of x; None: row i is row i.
    A weight of 4 bits gives the bits of a plain one: what it stands for, rounded to x's dtype."""
    groups, outputs, inputs = weight.shape
    rows = x.shape[0] if sources is None else sources.shape[0]
    tile = tile_for(tiles_for(capability(x.device), x.dtype), rows // groups, inputs, outputs)
    return grouped_in_tiles(x, weight, bias, sources, starts, tile)


def grouped_in_tiles(
    x: Tensor,
    weight: Tensor | Float4Weight,
    bias: Tensor | None,
    sources: Tensor | None,
    starts: Tensor,
    tile: Tile,
) -> Tensor:
    """The products in tiles of that size, which changes no bit."""
    groups, outputs, inputs = weight.shape
    rows = x.shape[0] if sources is None else sources.shape[0]
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    row_tiles = rows // tile.rows + groups
    packed, scales = (weight.words, weight.scales) if isinstance(weight, Float4Weight) else (weight, None)
    grouped_kernel[(row_tiles * triton.cdiv(outputs, tile.columns),)](
        x, sources, packed, scales, bias, starts, out, x.stride(0), row_tiles, groups, inputs, outputs,
        WHOLE=inputs % tile.depth == 0, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, TOGETHER=TOGETHER,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
