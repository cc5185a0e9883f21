"""Products with weights of 4 bits, which stay in 4 bits in memory: x · ((integers - zeros) · scales)ᵀ + bias.

A program makes one tile of the result from one segment of the inputs; `add_segments` adds them in their order.
Integers minus zeros are exact in x's dtype and are multiplied by the tensor cores; each group's sum is scaled in
fp32. With many tokens the weight is dequantised, rounded to x's dtype, for one product of the library. Where that
begins, `MOST_TOKENS`, and the tiles are estimates: an 8B shape on an H200 is 1.3 times as fast as in bf16 with 16
rows, and three quarters as fast with 256. `invariant` products have one tile for all numbers of tokens, and never the
library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.quantised_tiles import Tile, segments_for
from kernels.gpu.segments import add_segments
from kernels.weights import BLOCK, PER_WORD, PIECE, Int4Weight

MOST_TOKENS = 128  # of the kernel; with more the weight is dequantised
APART_TOKENS = 256  # with more, programs are many enough to take all segments each

# the layout of `Int4Weight`, for kernels
BLOCK_INPUTS, PIECE_INPUTS = tl.constexpr(BLOCK), tl.constexpr(PIECE)
NUM_PIECES = tl.constexpr(PER_WORD)  # of a block
# with more rows wgmma would take the integers from shared memory, where unpacking costs three times as much
FEW, MANY = Tile(16, 128, 4, 4), Tile(32, 128, 4, 4)
FP32 = Tile(16, 64, 4, 1)  # without tensor cores: for checks


@triton.jit
def _numbers(integers, DTYPE: tl.constexpr):
    """Integers, 0 to 31, plus a constant of DTYPE, exactly: their bits are those of its last places."""
    if DTYPE.is_bf16():
        numbers = (integers | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)  # 128 + integer
    elif DTYPE.is_fp16():
        numbers = (integers | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)  # 1024 + integer
    else:
        numbers = integers.to(tl.float32)
    return numbers


@triton.jit
def _scales(groups, FP16: tl.constexpr):
    """Of words of a zero and a scale, in fp32."""
    bits = (groups >> 16).to(tl.int16)
    return bits.to(tl.float16 if FP16 else tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
def accumulate_int4(
    x, words, groups, first, last, outputs, held_rows, held_columns,
    PIECES: tl.constexpr, BLOCKS: tl.constexpr, FP16: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] fp32: the products over blocks `first` to `last`. A group is PIECES pieces of a block, or
    BLOCKS whole blocks. x: pointers [ROWS, PIECE_INPUTS], words: [PIECE_INPUTS, COLUMNS], groups: [1, COLUMNS], all
    of input 0."""
    # words of 32 bits everywhere: then they are unpacked in the registers that the tensor cores read
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for block in range(first, last):
        packed = tl.load(words + block * (PIECE_INPUTS * outputs), mask=held_columns, other=0)
        for group in tl.static_range(NUM_PIECES // PIECES):
            place = (block // BLOCKS * (NUM_PIECES // PIECES) + group) * outputs
            shared = tl.load(groups + place, mask=held_columns, other=0)
            zero = _numbers(shared & 31, x.dtype.scalar.element_ty)
            part = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for piece in tl.static_range(PIECES):
                number = group * PIECES + piece
                a = tl.load(x + block * BLOCK_INPUTS + number * PIECE_INPUTS, mask=held_rows, other=0.0)
                b = _numbers((packed >> (4 * number)) & 15, x.dtype.scalar.element_ty) - zero
                part = tl.dot(a, b, part, input_precision="ieee")
            total += part * _scales(shared, FP16)
    return total


@triton.jit(do_not_specialize=["tokens"])
def int4_kernel(
    x, words, groups, bias, out, x_stride, tokens, blocks, outputs,
    SEGMENTS: tl.constexpr, APART: tl.constexpr, PIECES: tl.constexpr, BLOCKS: tl.constexpr, FP16: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [tokens, outputs]. APART: out [SEGMENTS, tokens, outputs] fp32, a segment each, and no bias. bias None:
    there is none. Programs of neighbouring rows follow each other, so that they find the weight in the L2 cache."""
    row_tiles = tl.cdiv(tokens, ROWS)
    number = tl.program_id(0)
    first_row, first_column = (number % row_tiles).to(tl.int64) * ROWS, (number // row_tiles) * COLUMNS
    row, column, lane = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, PIECE_INPUTS)
    held_rows = (row < tokens - first_row)[:, None]
    held_columns = (column < outputs - first_column)[None, :]
    x += first_row * x_stride + row[:, None] * x_stride + lane[None, :]
    words += first_column + lane[:, None] * outputs + column[None, :]
    groups += first_column + column[None, :]
    each = tl.cdiv(blocks, SEGMENTS)
    out += first_row * outputs + first_column
    if APART:
        segment = tl.program_id(1)
        total = accumulate_int4(
            x, words, groups, segment * each, tl.minimum((segment + 1) * each, blocks), outputs,
            held_rows, held_columns, PIECES, BLOCKS, FP16, ROWS, COLUMNS,
        )  # fmt: skip
        out += segment.to(tl.int64) * tokens * outputs
    else:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for segment in range(SEGMENTS):
            total += accumulate_int4(
                x, words, groups, segment * each, tl.minimum((segment + 1) * each, blocks), outputs,
                held_rows, held_columns, PIECES, BLOCKS, FP16, ROWS, COLUMNS,
            )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + first_column + column[None, :], mask=held_columns, other=0.0).to(tl.float32)
    place = row[:, None] * outputs + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=held_rows & held_columns)


@triton.jit
def int4_plain_kernel(
    words, groups, out, outputs,
    PIECES: tl.constexpr, BLOCKS: tl.constexpr, FP16: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [inputs, outputs] = (integers - zeros) · scales, rounded once. A program makes a block of inputs."""
    block, first_column = tl.program_id(1), tl.program_id(0) * COLUMNS
    column, lane = first_column + tl.arange(0, COLUMNS)[None, :], tl.arange(0, PIECE_INPUTS)[:, None]
    held = column < outputs
    packed = tl.load(
        words + (block.to(tl.int64) * PIECE_INPUTS + lane) * outputs + column, mask=held, other=0
    )
    for group in tl.static_range(NUM_PIECES // PIECES):
        place = (block // BLOCKS * (NUM_PIECES // PIECES) + group) * outputs + column
        shared = tl.load(groups + place, mask=held, other=0)
        zero, scale = shared & 31, _scales(shared, FP16)
        for piece in tl.static_range(PIECES):
            number = group * PIECES + piece
            weight = (((packed >> (4 * number)) & 15) - zero).to(tl.float32) * scale
            row = block.to(tl.int64) * BLOCK_INPUTS + number * PIECE_INPUTS + lane
            target = out + row * outputs + column
            tl.store(target, weight.to(out.dtype.element_ty), mask=held)


def int4_matmul(x: Tensor, weight: Int4Weight, bias: Tensor | None, *, invariant: bool = False) -> Tensor:
    if weight.order is not None:
        x = x[:, weight.order]
    if x.shape[0] > MOST_TOKENS and not invariant:
        plain = int4_plain(weight, x.dtype)
        return x @ plain if bias is None else torch.addmm(bias, x, plain)
    few = x.shape[0] <= FEW.rows and not invariant
    return int4_tiled(x, weight, bias, FP32 if x.dtype == torch.float32 else FEW if few else MANY)


def int4_tiled(x: Tensor, weight: Int4Weight, bias: Tensor | None, tile: Tile) -> Tensor:
    """The product in tiles of that size, x in stored order."""
    tokens, (outputs, inputs) = x.shape[0], weight.shape
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    segments = segments_for(inputs // BLOCK, outputs)
    apart = segments > 1 and tokens <= APART_TOKENS
    made = out
    if apart:
        made = torch.empty((segments, tokens, outputs), dtype=torch.float32, device=x.device)
    pieces, blocks = grouping(weight.group_size)
    grid = (triton.cdiv(tokens, tile.rows) * triton.cdiv(outputs, tile.columns), segments if apart else 1)
    int4_kernel[grid](
        x, weight.words, weight.groups, None if apart else bias, made,
        x.stride(0), tokens, inputs // BLOCK, outputs,
        SEGMENTS=segments, APART=apart, PIECES=pieces, BLOCKS=blocks, FP16=weight.scale == torch.float16,
        ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if apart:
        add_segments(made, bias, out)
    return out


def int4_plain(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """The weight `[in, out]`, inputs in stored order."""
    outputs, inputs = weight.shape
    out = torch.empty((inputs, outputs), dtype=dtype, device=weight.words.device)
    pieces, blocks = grouping(weight.group_size)
    int4_plain_kernel[(triton.cdiv(outputs, 256), inputs // BLOCK)](
        weight.words, weight.groups, out, outputs,
        PIECES=pieces, BLOCKS=blocks, FP16=weight.scale == torch.float16, COLUMNS=256, num_warps=8,
    )  # fmt: skip
    return out


def grouping(group_size: int) -> tuple[int, int]:
    """(pieces of a block that share a scale, blocks that do)."""
    return min(group_size, BLOCK) // PIECE, max(1, group_size // BLOCK)
