"""How products with quantised weights are cut: tiles of the result, and segments of what is summed.

Owns what 4 and 8 bits have in common: a tile's shape, and the segments of a product of few tokens, which the weight's
shape alone decides. Which tile a product takes is for `int4_matmul` and `fp8_matmul` to say.
"""

from __future__ import annotations

from typing import NamedTuple

from kernels.gpu.segments import power_of_two

MOST_SEGMENTS = 16
LEAST_BLOCKS = 4  # of a segment
PROGRAMS = 264  # two for each processor of an H100 or H200


class Tile(NamedTuple):
    """Of the result [rows, columns]. `stages`: blocks of inputs under way."""

    rows: int
    columns: int
    warps: int
    stages: int


def segments_for(blocks: int, outputs: int) -> int:
    """A power of two: as many as keep a device busy with a product of few tokens, each long enough to be worth it.
    `blocks`: of 128 inputs."""
    wanted = -(-PROGRAMS // -(-outputs // 128))
    return power_of_two(min(wanted, MOST_SEGMENTS, blocks // LEAST_BLOCKS))
