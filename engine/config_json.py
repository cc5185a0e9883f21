"""The `config.json` of one architecture becomes a `ModelConfig`, by what its family says.

Owns the reading of configuration fields and the refusal of what the decoder cannot compute. Knows no family by name
(`families` lists them), no files and no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from engine import family_fields
from engine.config_sizes import checked
from engine.families import FAMILIES
from engine.family import Family
from engine.field_kinds import check_kinds
from engine.model_config import Activation, ModelConfig, StoredDType, UnsupportedCheckpoint
from engine.rope_settings import rope_settings
from engine.text_part import TEXT_STORAGE, text_fields
from engine.windows import windows

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
# Fields by Llama's name that are ignored where the family has a name of its own for them: published files have both.
# Sizes are known to transformers by both names.
_IGNORED = frozenset(
    {"hidden_act", "rms_norm_eps", "intermediate_size", "rope_theta", "partial_rotary_factor"}
)


def model_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`config.json` (and `generation_config.json`, whose end-of-sequence ids win) as a `ModelConfig`.

    Raises `UnsupportedCheckpoint` naming the architecture or the field that is not supported.
    """
    architecture = only_architecture(config)
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedCheckpoint(
            f"architecture {architecture} is not supported; known: {', '.join(FAMILIES)}"
        )
    try:
        if family.text_kinds:
            kind, config = text_fields(config, tuple(family.text_kinds))
            inside = family.text_kinds[kind]
            family = replace(inside, flags={**inside.flags, "storage": TEXT_STORAGE})
        check_kinds(config)
        return _decoder(
            architecture, family, {**config, "eos_token_ids": end_tokens(config, generation or {})}
        )
    except KeyError as error:
        raise UnsupportedCheckpoint(f"config.json lacks {error.args[0]}") from None
    except UnsupportedCheckpoint:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UnsupportedCheckpoint(f"config.json has a value of the wrong kind: {error}") from None


def only_architecture(config: Mapping[str, Any]) -> str:
    """The one that `architectures` names. Raises `UnsupportedCheckpoint` where it names none or several."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1:
        raise UnsupportedCheckpoint(f"config.json must name one architecture, not {names!r}")
    return str(names[0])


def _decoder(architecture: str, family: Family, given: Mapping[str, Any]) -> ModelConfig:
    config = _in_llamas_words(family, given)
    activation = str(config.get("hidden_act", "silu"))
    if activation not in _ACTIVATIONS:
        raise UnsupportedCheckpoint(
            f"hidden_act {activation!r} is not supported; allowed: {', '.join(_ACTIVATIONS)}"
        )
    num_heads = int(config["num_attention_heads"])
    max_position = int(config.get("max_position_embeddings", 2048))
    theta, scaling = rope_settings(config)
    if scaling is not None and scaling.kind == "yarn":  # published configs state the one or the other
        max_position = max(max_position, int(scaling.original_max_position * scaling.factor))
    flags = {
        "activation": _ACTIVATIONS[activation],
        "max_position": max_position,
        **family.flags,
        **family.read_flags(config),
    }
    if "windowed_rope_theta" not in flags and "sliding_attention" in (config.get("rope_parameters") or {}):
        raise UnsupportedCheckpoint(f"rope_parameters by kind of layer are not supported for {architecture}")
    if (
        "partial_rotary_factor" not in flags
        and family_fields.partial_rotary(config)["partial_rotary_factor"] != 1.0
    ):
        raise UnsupportedCheckpoint(f"partial_rotary_factor other than 1 is not supported for {architecture}")
    attention_bias = bool(config.get("attention_bias", False))
    return checked(
        ModelConfig(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias,
            out_bias=bool(config.get("attention_out_bias", attention_bias)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            windows=windows(config, family.windowed),
            dtype=checkpoint_dtype(config),
            eos_token_ids=config["eos_token_ids"],
            bos_token_id=config.get("bos_token_id"),
            **flags,
        )
    )


def _in_llamas_words(family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    for name, allowed in family.only.items():
        if given.get(name, allowed) != allowed:
            raise UnsupportedCheckpoint(f"{name} {given[name]!r} is not supported; allowed: {allowed!r}")
    ignored = _IGNORED.intersection(family.words.values())
    read = {name: value for name, value in given.items() if name not in ignored}
    translated = {llamas: given[own] for own, llamas in family.words.items() if own in given}
    config = {**family.defaults, **read, **translated}
    return {**config, **family.fields(config), **family.always}


def end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The end-of-sequence ids; those of `generation_config.json` win."""
    found = generation.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(int(token_id) for token_id in ids)


def checkpoint_dtype(config: Mapping[str, Any]) -> StoredDType:
    """What the weights are stored in."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise UnsupportedCheckpoint(f"dtype {name} is not supported; allowed: bfloat16, float16, float32")
    return cast(StoredDType, name)
