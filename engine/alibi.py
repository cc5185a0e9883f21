"""The slopes of ALiBi: attention with linear biases (Press et al. 2022).

Owns the slopes alone; what is done with them is in the contract of `kernels`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """`[num_heads]` fp32: for a power of two the geometric series that starts at its own ratio 2^(-8 / num_heads);
    any other number takes the rest from every other slope of twice as many heads."""
    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / closest) for i in range(1, closest + 1)]
    between = [2.0 ** (-4.0 * i / closest) for i in range(1, 2 * closest, 2)]
    return torch.tensor(slopes + between[: num_heads - closest], dtype=torch.float32)
