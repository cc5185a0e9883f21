"""The noise of draws: one number per seed and position, a hash, so that no state is carried from token to token.

Owns the formula, in numpy; `gpu/noise.py` says the same inside kernels. Knows nothing of what is drawn with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
STREAM = 0xD1342543DE82EF95
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
INVERSE_2_53 = 2.0**-53

Integers = Sequence[int] | NDArray[np.int64]


def uniforms(seeds: Integers, positions: Integers) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 bits per (sequence seed, position), both `[S]` and of 64 bits: SplitMix64's
    mixer over both (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = np.asarray(seeds, dtype=np.int64).astype(np.uint64)
        state = _mix(state + np.uint64(GOLDEN))
        state ^= np.asarray(positions, dtype=np.int64).astype(np.uint64) * np.uint64(STREAM)
        state = _mix(state + np.uint64(GOLDEN))
    result: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * INVERSE_2_53
    return result


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))
