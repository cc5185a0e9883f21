"""Foreign architectures: the `config.json` of a model that transformers computes for us → `ModelConfig`.

Owns the names under which sizes are written down, and the refusal of what `config.json` alone shows to be out of
reach. Never loads torch, so the worker can read it. What only the model itself can tell, whether transformers
knows it and whether its attention can be ours, is asked in the engine process (`anatomy`), where the sizes of
attention are measured as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

from engine.config_json import checkpoint_dtype, end_tokens, only_architecture
from engine.families import FAMILIES
from engine.model_config import ModelConfig, UnsupportedCheckpoint
from engine.rope_settings import rope_parameters

_ENDINGS = ("ForCausalLM", "LMHeadModel")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_REFUSED = {
    "is_encoder_decoder": "an encoder with a decoder is not supported",
    "add_cross_attention": "cross attention is not supported",
    "text_config": "models of more than text are not supported",
    "quantization_config": "quantised safetensors are not supported for a model of transformers' own code",
}
# What configuration classes call the same size
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


def model_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`config.json` (and `generation_config.json`, whose end-of-sequence ids win) as a `ModelConfig`.

    Raises `UnsupportedCheckpoint` naming the architecture or the field that is not supported.
    """
    architecture = only_architecture(config)
    if not architecture.endswith(_ENDINGS):
        raise UnsupportedCheckpoint(
            f"architecture {architecture} is not supported; known: {', '.join(FAMILIES)}, and what transformers "
            f"knows as a causal language model (…{' or …'.join(_ENDINGS)})"
        )
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise UnsupportedCheckpoint(f"{architecture}: {name}: {reason}")
    try:
        _refuse_rope(architecture, config)
        _refuse_layers(architecture, config)
        size = partial(_size, architecture, config)
        heads, hidden = size(_HEADS), size(_HIDDEN)
        return ModelConfig(
            architecture=architecture,
            definition="transformers",
            vocab_size=size(("vocab_size",)),
            hidden_size=hidden,
            num_layers=size(_LAYERS),
            num_heads=heads,
            num_kv_heads=size(_KV_HEADS, default=1 if config.get("multi_query") else heads),
            head_dim=size(("head_dim",), default=hidden // heads),
            max_position=size(_POSITIONS),
            # The next three are read by our own decoder alone
            intermediate_size=0,
            norm_eps=0.0,
            rope_theta=0.0,
            dtype=checkpoint_dtype(config),
            eos_token_ids=end_tokens(config, generation or {}),
            bos_token_id=config.get("bos_token_id"),
        )
    except UnsupportedCheckpoint:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UnsupportedCheckpoint(f"config.json has a value of the wrong kind: {error}") from None


def _size(
    architecture: str, config: Mapping[str, Any], names: tuple[str, ...], default: int | None = None
) -> int:
    for name in names:
        if config.get(name) is not None:
            value = int(config[name])
            if value < 1:
                raise UnsupportedCheckpoint(f"{architecture}: {name} must be at least 1, not {value}")
            return value
    if default is None:
        raise UnsupportedCheckpoint(f"{architecture}: config.json lacks {names[0]}")
    return default


def _refuse_rope(architecture: str, config: Mapping[str, Any]) -> None:
    """Frequencies that follow the length of a sequence would follow the longest one of the step."""
    rope_parameters(config)  # refuses what contradicts itself
    for kind in chain.from_iterable(
        _rope_types(config.get(name)) for name in ("rope_parameters", "rope_scaling")
    ):
        if kind not in _ROPE_TYPES:
            raise UnsupportedCheckpoint(
                f"{architecture}: rope_type {kind!r} is not supported; allowed: {', '.join(_ROPE_TYPES)}"
            )


def _rope_types(parameters: Mapping[str, Any] | None) -> Iterator[str]:
    """Of the model, or of each kind of layer where they differ."""
    for name, value in (parameters or {}).items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif name in ("rope_type", "type"):
            yield str(value)


def _refuse_layers(architecture: str, config: Mapping[str, Any]) -> None:
    for kind in config.get("layer_types") or ():
        if kind not in _LAYER_TYPES:
            raise UnsupportedCheckpoint(
                f"{architecture}: layer_types: {kind} is not supported; allowed: {', '.join(_LAYER_TYPES)}"
            )
