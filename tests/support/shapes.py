"""A `ModelConfig` for tests that need no weights: the least of everything, and what the test is about."""

from __future__ import annotations

from typing import Any

from engine.model_config import ModelConfig


def shape(*, vocab_size: int, eos_token_ids: tuple[int, ...], **fields: Any) -> ModelConfig:
    least: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "max_position": 64,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
    }
    return ModelConfig(vocab_size=vocab_size, eos_token_ids=eos_token_ids, **least | fields)
