"""How a matrix product is cut: tiles of the result, and segments of what is summed.

The weight's shape, the dtype and the architecture alone decide in which order a result is summed: in segments of the
inputs, each from its first block of `depth` inputs to its last, then the segments in turn. How many tokens there are
decides only how large a tile is and whether a program takes one segment or all of them, which should change no bit:
an instruction of the tensor cores sums over 16 inputs whatever its tile, and all tiles of a table use instructions of
one kind (`tests/kernels/test_ahead.py`). No GPU has confirmed it yet; the check at load looks at all tiles. Not yet
measured for speed. Nothing is tried out at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gpu.architectures import architecture
from kernels.gpu.segments import power_of_two

MOST_SEGMENTS = 8
LEAST_INPUTS = 512  # of a segment
WIDE_OUTPUTS = 16384  # from so many on, a tile of few programs is worth nothing
FEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """Of the result [rows, columns], made from `depth` inputs at a time. `enough`: programs from which on each takes
    all segments, because the device is busy then."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int  # blocks of inputs under way
    enough: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """`few`: up to `FEW_TOKENS` tokens, when the weight is what is read. `wide`: of weights with many outputs."""

    few: Tile
    many: Tile
    wide: Tile


_SIXTEEN_BITS = {
    "sm_80": Tiles(
        few=Tile(64, 64, 64, 4, 4, 96),
        many=Tile(128, 128, 64, 8, 3, 48),
        wide=Tile(128, 128, 64, 8, 3, 48),
    ),
    "sm_90": Tiles(
        few=Tile(64, 64, 64, 4, 6, 96),
        many=Tile(128, 128, 64, 8, 4, 48),
        wide=Tile(128, 256, 64, 8, 4, 48),
    ),
    "sm_100": Tiles(
        few=Tile(64, 64, 64, 4, 6, 96),
        many=Tile(128, 128, 64, 8, 4, 48),
        wide=Tile(128, 128, 64, 8, 4, 48),
    ),
}
_OF_FP32 = Tile(32, 32, 32, 4, 2, 96)  # without tensor cores: for checks
_FP32 = Tiles(few=_OF_FP32, many=_OF_FP32, wide=_OF_FP32)


def tiles_for(capability: tuple[int, int], dtype: torch.dtype) -> Tiles:
    """`capability` of the device, as torch says it."""
    return _FP32 if dtype == torch.float32 else _SIXTEEN_BITS[architecture(capability)]


def tile_for(tiles: Tiles, tokens: int, inputs: int, outputs: int) -> Tile:
    # a block that is cut short is read value by value, which takes many registers
    if tokens <= FEW_TOKENS or inputs % tiles.few.depth:
        return tiles.few
    return tiles.wide if outputs >= WIDE_OUTPUTS else tiles.many


def segments_for(inputs: int, outputs: int) -> int:
    """A power of two: as many as keep a device busy with a product of few tokens, each long enough to be worth it."""
    wanted = -(-96 // -(-outputs // 64))
    return power_of_two(min(wanted, MOST_SEGMENTS, inputs // LEAST_INPUTS))
