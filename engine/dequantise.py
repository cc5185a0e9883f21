"""Dequantise: stored integers or floats of 8 or 4 bits, with their zeros and scales, as fp32 weights.

Owns the order of bits in words and the formulas, (integer - zero) · scale and float · scale, one fp32 product per
weight, so that a weight is rounded once more only where it is converted to its parameter's dtype; of floats of 4
bits, whose scales are powers of two, not even there where that is bf16. Knows no names and no files
(`packed_module`, `float8_module`, `float4_module`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.weights import FLOATS_OF_4_BITS, POWERS

# Of eight outputs that share a word, where each one's bits begin: from its lowest bits on, a word holds outputs
# 0, 2, 4, 6, 1, 3, 5, 7
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def unpacked_awq(words: Tensor) -> Tensor:
    """words `[n, out / 8]` int32 → `[n, out]` int32, 0 to 15."""
    shifts = torch.tensor(_AWQ_SHIFTS, dtype=torch.int32, device=words.device)
    integers: Tensor = (words[:, :, None] >> shifts) & 15
    return integers.flatten(1)


def unpacked_columns(words: Tensor, bits: Literal[4, 8]) -> Tensor:
    """words `[n, out · bits / 32]` int32 → `[n, out]` int32, each word's lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    integers: Tensor = (words[:, :, None] >> shifts) & (2**bits - 1)
    return integers.flatten(1)


def unpacked_rows(words: Tensor, bits: Literal[4, 8]) -> Tensor:
    """words `[n · bits / 32, out]` int32 → `[n, out]` int32, each word's lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    integers: Tensor = (words[:, None, :] >> shifts[:, None]) & (2**bits - 1)
    return integers.flatten(0, 1)


def scaled_integers(integers: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """integers `[n, out]` int32, zeros `[g, out]` int32, scales `[g, out]` fp32, groups `[n]` int64: the group of
    each row → `[n, out]` fp32."""
    return (integers - zeros[groups]).float() * scales[groups]


def scaled_floats(floats: Tensor, scales: Tensor, block: tuple[int, int], start: int) -> Tensor:
    """floats `[n, in]`, the rows from `start` on of a weight whose blocks of `block` outputs and inputs have one
    scale each, scales `[blocks of outputs, blocks of inputs]` fp32 → `[n, in]` fp32."""
    rows = torch.arange(start, start + floats.shape[0]) // block[0]
    of_rows = scales[rows]  # [n, blocks of inputs]
    if scales.shape[1] > 1:
        of_rows = of_rows[:, :, None].expand(-1, -1, block[1]).flatten(1)[:, : floats.shape[1]]
    return floats.float() * of_rows


def scaled_blocks(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks `[n, in / 32, 16]` uint8, of two inputs a byte, the first in its low bits; scales `[n, in / 32]` uint8 →
    `[n, in]` fp32. A scale of 255 is NaN."""
    floats = torch.tensor(FLOATS_OF_4_BITS)
    pairs = torch.stack((floats.repeat(16), floats.repeat_interleave(16)), dim=-1)  # [256, 2]: of each byte
    powers = torch.tensor(POWERS, dtype=torch.float64).float()
    made: Tensor = pairs[blocks.int()].flatten(2) * powers[scales.int()].unsqueeze(-1)  # [n, in / 32, 32]
    return made.flatten(1)
