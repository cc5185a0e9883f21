"""Rotary frequencies are those of transformers, for every kind of scaling that is supported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.config_json import model_config
from engine.rope import inverse_frequencies, rope_tables

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    YARN,
    {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    {**YARN, "attention_factor": 0.7},
    {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    {**YARN, "truncate": False},
    {**YARN, "factor": 1.0},
    {**YARN, "original_max_position_embeddings": 8, "factor": 40.0},  # both bounds outside of the channels
]


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_frequencies_equal_transformers(scaling: dict[str, Any], theta: float) -> None:
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=16384,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    expected, stretch = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"))
    config = model_config({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]})
    torch.testing.assert_close(inverse_frequencies(config, 16384), expected, rtol=1e-6, atol=0)
    cos, sin = rope_tables(config, 3, "cpu")
    torch.testing.assert_close(cos[0], torch.full((64,), float(stretch)), rtol=1e-6, atol=0)
    torch.testing.assert_close(sin[2], (2 * expected).sin() * stretch, rtol=1e-5, atol=1e-7)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 64 for i in range(64)],
    "long_factor": [1.5 + i for i in range(64)],
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    "changes", [{}, {"factor": 2.5}, {"attention_factor": 0.8}, {"factor": 1.0}], ids=str
)
@pytest.mark.parametrize("max_len", [4096, 4097])
def test_longrope_is_chosen_by_the_longest_sequence_that_may_come(
    changes: dict[str, Any], max_len: int
) -> None:
    theirs = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=16384,
        rope_parameters={**LONGROPE, **changes, "rope_theta": 1e4},
    )
    expected, stretch = ROPE_INIT_FUNCTIONS["longrope"](theirs, torch.device("cpu"), seq_len=max_len)
    config = model_config({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]})
    torch.testing.assert_close(inverse_frequencies(config, max_len), expected, rtol=1e-6, atol=0)
    cos, _ = rope_tables(config, max_len, "cpu")
    torch.testing.assert_close(cos[0], torch.full((64,), float(stretch)), rtol=1e-6, atol=0)
    torch.testing.assert_close(cos[2], (2 * expected).cos() * stretch, rtol=1e-5, atol=1e-6)
