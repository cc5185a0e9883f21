"""How large the tiles of attention are, per architecture, head dimension and dtype.

Those of sm_90 were measured on an H200, with pages of 64, 1,024 tokens and 32 heads of 128 channels: plain attention
took 544 µs (with 128 rows 576), with a window 542 µs instead of 651, with a cache of 8 bits 942 µs instead of 1,728.
A thread spilled some hundred bytes then. Since V in pages is finite, plain attention spills nothing and few other
kinds do (`tests/kernels/test_ahead.py`); that has not been measured. What fills the registers is the sum of a split
beside the sum of those before it. The others were chosen by what ptxas reports: registers, shared memory, and in 16
bits no spills on sm_100 (sm_80 spills where a window, a cap and slopes meet; fp32, which is for checks, a few bytes).
Nothing is tried out at run time. T and R decide nothing here, so that a token's result does not depend on its crowd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kernels.gpu.architectures import Architecture, architecture


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of a block are pairs of query and head. `tokens`: K and V that a program takes at a time, for all kinds
    of rows, so that their sums run in the same order; it divides the shortest split."""

    rows: int  # of rows with many queries
    tokens: int
    warps: int
    stages: int  # tiles of K and V under way
    decode_warps: int
    decode_stages: int


# by head dimension, rounded up to a power of two: rows, tokens, warps, stages; decode warps, decode stages
_SIXTEEN_BITS: Mapping[Architecture, Mapping[int, Tiles]] = {
    "sm_80": {
        64: Tiles(64, 64, 8, 3, 4, 5),
        128: Tiles(64, 32, 8, 2, 4, 5),
        256: Tiles(32, 32, 8, 3, 4, 3),
    },
    "sm_90": {
        64: Tiles(64, 64, 4, 2, 4, 2),
        128: Tiles(64, 64, 4, 2, 4, 2),
        256: Tiles(64, 32, 8, 2, 4, 2),
    },
    "sm_100": {
        64: Tiles(64, 64, 8, 3, 4, 5),
        128: Tiles(64, 32, 8, 3, 4, 5),
        256: Tiles(32, 32, 8, 3, 4, 5),
    },
}
# where the cache has 8 bits, which pass through registers
_CACHE_OF_8_BITS: Mapping[tuple[Architecture, int], Tiles] = {("sm_90", 128): Tiles(128, 64, 8, 2, 4, 2)}
_FP32 = {64: Tiles(16, 16, 4, 1, 4, 1), 128: Tiles(16, 16, 4, 1, 4, 1), 256: Tiles(16, 16, 8, 1, 8, 1)}
WIDEST = 256
MOST_DECODE_ROWS = 64


def tiles_for(capability: tuple[int, int], width: int, *, fp32: bool, scaled: bool) -> Tiles:
    """`capability` of the device, as torch says it; `width`: the head dimension, rounded up to a power of two;
    `scaled`: the cache has 8 bits."""
    arch, width = architecture(capability), max(64, width)
    if scaled and not fp32 and (arch, width) in _CACHE_OF_8_BITS:
        return _CACHE_OF_8_BITS[arch, width]
    return (_FP32 if fp32 else _SIXTEEN_BITS[arch])[width]


def decode_rows(group: int) -> int:
    """Rows of a block for one query: its heads, at least what a tensor core takes."""
    rows = 16
    while rows < min(group, MOST_DECODE_ROWS):
        rows *= 2
    return rows
