"""Products of groups of rows with weights of 8 bits, one weight for each group, in one launch.

Owns which program makes which tile, as `grouped_matmul` does for other weights; what becomes of x, and the sums, are
those of `fp8_matmul`. There is one tile for all sizes of groups, whose tensor core instruction sums in one way: a
row's bits depend on that row alone. It is the one that products of some tokens were found to be fast with; with
groups it was not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.architectures import capability
from kernels.gpu.fp8_matmul import SOME, accumulate_fp8, quantise_rows
from kernels.gpu.groups import rows_of
from kernels.gpu.matmul import TOGETHER, tile_of
from kernels.weights import BLOCK, Float8Experts


@triton.jit(do_not_specialize=["row_tiles"])
def grouped_fp8_kernel(
    x, x_scales, sources, weight, scales, bias, starts, out, row_tiles, groups, inputs, outputs,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out [N, outputs]: rows starts[g] until starts[g + 1] are x · weight[g]ᵀ + bias[g]. x and x_scales: as
    `quantise_rows` leaves them; weight and scales: as `Float8Experts` has them; bias [groups, outputs] or None. Row i
    takes row sources[i] of x; sources None: row i. COLUMNS divides 128. Programs: row_tiles, as `groups` has them,
    · column tiles."""
    tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(outputs, COLUMNS), TOGETHER)
    first_column = column_tile.to(tl.int64) * COLUMNS
    group, first_row, end = rows_of(tile, starts, groups, ROWS)
    if first_row >= end:
        return

    row, column, lane = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, 128)
    held_rows, held_columns = row < end, column < outputs - first_column
    source = row
    if sources is not None:
        source = tl.load(sources + row, mask=held_rows, other=0)
    source, group = source.to(tl.int64), group.to(tl.int64)
    blocks = tl.cdiv(inputs, 128)
    weight += (group * outputs + first_column) * inputs
    total = accumulate_fp8(
        tl.zeros((ROWS, COLUMNS), dtype=tl.float32),
        x + source[:, None] * inputs + lane[None, :], x_scales + source * blocks,
        weight + column[None, :] * inputs + lane[:, None],
        scales + (group * tl.cdiv(outputs, 128) + first_column // 128) * blocks,
        0, blocks, inputs, held_rows, held_columns, BLOCKS,
    )  # fmt: skip
    if not BLOCKS:
        x_scale = tl.load(x_scales + source, mask=held_rows, other=0.0)
        scale = tl.load(scales + group * outputs + first_column + column, mask=held_columns, other=0.0)
        total *= x_scale[:, None] * scale[None, :]
    if bias is not None:
        bias += group * outputs + first_column
        total += tl.load(bias + column, mask=held_columns, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * outputs + first_column + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=held_rows[:, None] & held_columns[None, :])


def grouped_fp8_matmul(
    x: Tensor, weight: Float8Experts, bias: Tensor | None, sources: Tensor | None, starts: Tensor
) -> Tensor:
    """`[N, out]`: as `grouped_matmul`, of x rounded as `fp8_matmul` rounds it."""
    groups, outputs, inputs = weight.shape
    rows = x.shape[0] if sources is None else sources.shape[0]
    floats, x_scales = quantise_rows(x, BLOCK if weight.blocks else inputs)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    row_tiles = rows // SOME.rows + groups
    grouped_fp8_kernel[(row_tiles * triton.cdiv(outputs, SOME.columns),)](
        floats, x_scales, sources, weight.floats, weight.scales, bias, starts, out,
        row_tiles, groups, inputs, outputs,
        BLOCKS=weight.blocks, ROWS=SOME.rows, COLUMNS=SOME.columns, TOGETHER=TOGETHER, num_warps=SOME.warps,
        num_stages=SOME.stages if capability(x.device)[0] in (9, 10) else min(SOME.stages, 3),  # or too large
    )  # fmt: skip
    return out
