"""Rotary position embedding tables: default, linear and Llama 3 frequencies.

Owns frequencies, cosines and sines; knows no heads and no cache. Tables are computed once, by position, so
that a token's rotation cannot depend on which other tokens share its step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """`[rotary_dim / 2]` fp32, radians per token (Su et al. 2021; Llama 3 scaling as published by Meta)."""
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3: long waves are stretched by `factor`, short ones kept, those between blended linearly
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelength - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_tables(config: ModelConfig, max_len: int, device: str) -> tuple[Tensor, Tensor]:
    """(cos, sin), each `[max_len, rotary_dim / 2]` fp32."""
    positions = torch.arange(max_len, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config))
    return angles.cos().to(device), angles.sin().to(device)
