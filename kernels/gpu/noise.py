"""The noise of draws inside kernels: the bits of `kernels.noise`, whose constants it takes."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import noise

GOLDEN, STREAM = tl.constexpr(noise.GOLDEN), tl.constexpr(noise.STREAM)
FIRST, SECOND = tl.constexpr(noise.FIRST), tl.constexpr(noise.SECOND)
INVERSE_2_53 = tl.constexpr(noise.INVERSE_2_53)


@triton.jit
def uniform(seed, position):
    """A number in [0, 1) with 53 bits, in fp64; seed and position int64, of any one shape."""
    state = _mix(seed.to(tl.uint64, bitcast=True) + GOLDEN)
    state = _mix((state ^ (position.to(tl.uint64, bitcast=True) * STREAM)) + GOLDEN)
    return (state >> 11).to(tl.float64) * INVERSE_2_53


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)
