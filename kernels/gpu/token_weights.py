"""Token weights inside kernels: in whole numbers, so that no order of a sum can change it, whatever layout the
compiler has chosen.

Owns how a logit becomes such a number. Knows nothing of what is summed and drawn with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEPS = tl.constexpr(2.0**40)  # in the weight of the largest; 2¹³ weights are exact in fp64, 2²² fit int64
COLDEST = tl.constexpr(2.0**-126)  # smaller numbers in fp32 may count as 0


@triton.jit
def weights(values, largest, temperature):
    """exp((values - largest) / temperature) in whole steps: values fp32, not above `largest`, to int64."""
    safe = tl.where(largest == float("-inf"), 0.0, largest)  # a block of masked tokens
    return (tl.exp((values - safe) / tl.maximum(temperature, COLDEST)) * STEPS).to(tl.int64)
