"""Which fields of config.json are numbers, and which are true or false.

Owns the refusal, by the name of the field, of a value of another kind: a string in the place of a switch would
otherwise count as true, whatever it says. Knows no families: each reads its own fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.model_config import UnsupportedCheckpoint

_NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)
_SWITCHES = (
    "tie_word_embeddings",
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "bias",
    "use_sliding_window",
    "use_bidirectional_attention",
    "use_parallel_residual",
    "parallel_attn",
    "multi_query",
    "new_decoder_architecture",
    "alibi",
    "norm_topk_prob",
)


def check_kinds(config: Mapping[str, Any]) -> None:
    """Raises `UnsupportedCheckpoint` naming the field; null counts as left out."""
    for name in _NUMBERS:
        if not isinstance(config.get(name), int | float | None):
            _refuse(name, "a number", config[name])
    for name in _SWITCHES:
        if not isinstance(config.get(name), bool | None):
            _refuse(name, "true or false", config[name])


def _refuse(name: str, kind: str, value: Any) -> None:
    raise UnsupportedCheckpoint(
        f"config.json has a value of the wrong kind: {name} must be {kind}, not {value!r}"
    )
