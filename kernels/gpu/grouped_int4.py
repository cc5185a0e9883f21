"""Products of groups of rows with integers of 4 bits, one weight for each group, in one launch.

Owns which program makes which tile, as `grouped_matmul` does for other weights; the sums are those of `int4_matmul`.
There is one tile for all sizes of groups, in which integers are unpacked in registers: a row's bits depend on that
row alone. A weight that many rows meet is unpacked again for every tile of them. The tile is the one of single
products; with groups it was not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.groups import rows_of
from kernels.gpu.int4_matmul import FP32, MANY, PIECE_INPUTS, accumulate_int4, grouping
from kernels.gpu.matmul import TOGETHER, tile_of
from kernels.weights import BLOCK, Int4Experts


@triton.jit(do_not_specialize=["row_tiles"])
def grouped_int4_kernel(
    x, sources, words, shared, bias, starts, out, x_stride, row_tiles, groups, blocks, shared_groups, outputs,
    PIECES: tl.constexpr, BLOCKS: tl.constexpr, FP16: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out [N, outputs]: rows starts[g] until starts[g + 1] are x · weight[g]ᵀ + bias[g]. words and shared, groups of
    inputs, shared_groups to a weight: as `Int4Experts` has them; bias [groups, outputs] or None. Row i takes row
    sources[i] of x; sources None: row i. Programs: row_tiles, as `groups` has them, · column tiles."""
    tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(outputs, COLUMNS), TOGETHER)
    first_column = column_tile.to(tl.int64) * COLUMNS
    group, first_row, end = rows_of(tile, starts, groups, ROWS)
    if first_row >= end:
        return

    row, column, lane = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, PIECE_INPUTS)
    held_rows, held_columns = (row < end)[:, None], (column < outputs - first_column)[None, :]
    source = row
    if sources is not None:
        source = tl.load(sources + row, mask=row < end, other=0)
    group = group.to(tl.int64)
    words += group * blocks * PIECE_INPUTS * outputs + first_column
    shared += group * shared_groups * outputs + first_column
    total = accumulate_int4(
        x + source.to(tl.int64)[:, None] * x_stride + lane[None, :],
        words + lane[:, None] * outputs + column[None, :], shared + column[None, :],
        0, blocks, outputs, held_rows, held_columns, PIECES, BLOCKS, FP16, ROWS, COLUMNS,
    )  # fmt: skip
    if bias is not None:
        bias += group * outputs + first_column
        total += tl.load(bias + column[None, :], mask=held_columns, other=0.0).to(tl.float32)
    place = row.to(tl.int64)[:, None] * outputs + first_column + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=held_rows & held_columns)


def grouped_int4_matmul(
    x: Tensor, weight: Int4Experts, bias: Tensor | None, sources: Tensor | None, starts: Tensor
) -> Tensor:
    """`[N, out]`: as `grouped_matmul`."""
    groups, outputs, inputs = weight.shape
    rows = x.shape[0] if sources is None else sources.shape[0]
    tile = FP32 if x.dtype == torch.float32 else MANY
    pieces, blocks = grouping(inputs // weight.groups.shape[1])
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    row_tiles = rows // tile.rows + groups
    grouped_int4_kernel[(row_tiles * triton.cdiv(outputs, tile.columns),)](
        x, sources, weight.words, weight.groups, bias, starts, out,
        x.stride(0), row_tiles, groups, inputs // BLOCK, weight.groups.shape[1], outputs,
        PIECES=pieces, BLOCKS=blocks, FP16=weight.scale == torch.float16, ROWS=tile.rows, COLUMNS=tile.columns,
        TOGETHER=TOGETHER, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
