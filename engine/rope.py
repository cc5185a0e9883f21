"""Rotary position embedding tables: default, linear, Llama 3, YaRN and LongRoPE frequencies.

Owns frequencies, cosines and sines; knows no heads and no cache. Tables are computed once, by position, so
that a token's rotation cannot depend on which other tokens share its step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model_config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, max_len: int) -> Tensor:
    """`[rotary_dim / 2]` fp32, radians per token (Su et al. 2021; Llama 3 scaling as published by Meta; YaRN: Peng et
    al. 2023; LongRoPE: Ding et al. 2024).

    LongRoPE has two sets of frequencies, for sequences within the original context and for longer ones. What is
    stored of a token cannot be rotated anew when its sequence outgrows the first, so one set holds for all: the
    one for `max_len`, the longest sequence that may come.
    """
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        kept = 1 - _yarn_ramp(config, scaling)
        return (1 - kept) * frequencies / scaling.factor + kept * frequencies
    if scaling.kind == "longrope":
        stretched = max_len > scaling.original_max_position
        return frequencies / torch.tensor(scaling.long_factors if stretched else scaling.short_factors)
    # Llama 3: long waves are stretched by `factor`, short ones kept, those between blended linearly
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelength - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def _yarn_ramp(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """`[rotary_dim / 2]` from 0, a channel that is kept, to 1, one that is stretched."""
    dim = config.rotary_dim

    def channel(rotations: float) -> float:
        """The one whose wave turns that many times over the original context."""
        wavelength = scaling.original_max_position / rotations
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # a step
    return ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)


def rope_tables(config: ModelConfig, max_len: int, device: str) -> tuple[Tensor, Tensor]:
    """(cos, sin), each `[max_len, rotary_dim / 2]` fp32."""
    positions = torch.arange(max_len, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config, max_len))
    stretch = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    return (angles.cos() * stretch).to(device), (angles.sin() * stretch).to(device)
