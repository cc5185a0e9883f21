"""Families as data: how the `config.json` of one architecture becomes a `ModelConfig`.

Owns the reading of configuration fields and the refusal of what the decoder cannot compute. Knows no files
and no tensors. A new Llama-like family is one entry in `FAMILIES`; no other code branches on its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from engine.config import ModelConfig, RopeScaling

DTypeName = Literal["bfloat16", "float16", "float32"]


class UnsupportedCheckpoint(ValueError):
    """These files cannot be run, and the message says why. Raised before any weight is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture is beyond a plain Llama.

    `defaults`: fields that its config.json may leave out, as transformers fills them in. `always`: fields that
    its config.json has no say in. `flags`: those of `ModelConfig` that follow from the name. `read_flags`: those
    that it reads from fields of its own.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    read_flags: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}


def _no_rope_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    num_layers, interval = int(config["num_hidden_layers"]), config.get("no_rope_layer_interval", 4)
    uses_rope = config.get("no_rope_layers")  # 1: this layer rotates; despite its name
    if uses_rope is None:
        uses_rope = [(i + 1) % int(interval) for i in range(num_layers)]
    if len(uses_rope) < num_layers:
        raise UnsupportedCheckpoint(f"no_rope_layers has {len(uses_rope)} entries for {num_layers} layers")
    return {"no_rope_layers": tuple(i for i in range(num_layers) if not uses_rope[i])}


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found


def _partial_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    factor = _rope_parameters(config).get("partial_rotary_factor") or config.get("partial_rotary_factor")
    return {"partial_rotary_factor": float(factor or 1.0)}


def _multipliers(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    return {name: float(config.get(name, 1.0)) for name in names}


_NO_BIAS = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}

FAMILIES: Mapping[str, Family] = {
    # Llama 1 to 3 and its many relatives under the same name, SmolLM2 among them
    "LlamaForCausalLM": Family(always={"use_sliding_window": False}),
    "MistralForCausalLM": Family(
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        always={**_NO_BIAS, "use_sliding_window": True},
    ),
    "Qwen2ForCausalLM": Family(
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
        always={**_NO_BIAS, "attention_bias": True},
    ),
    "Qwen3ForCausalLM": Family(
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        always={"mlp_bias": False},
        flags={"qk_norm": "head"},
    ),
    "Olmo2ForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5},
        always={"mlp_bias": False, "use_sliding_window": False},
        flags={"qk_norm": "all", "norm_position": "after"},
    ),
    "SmolLM3ForCausalLM": Family(
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
        read_flags=_no_rope_layers,
    ),
    "Phi3ForCausalLM": Family(
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        always={**_NO_BIAS, "use_sliding_window": True},
        flags={"merged_weights": True},
        read_flags=_partial_rotary,
    ),
    "GraniteForCausalLM": Family(always={"use_sliding_window": False}, read_flags=_multipliers),
    "SeedOssForCausalLM": Family(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
        },
        always={"use_sliding_window": False},
    ),
}


def model_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`config.json` (and `generation_config.json`, whose end-of-sequence ids win) as a `ModelConfig`.

    Raises `UnsupportedCheckpoint` naming the architecture or the field that is not supported.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1:
        raise UnsupportedCheckpoint(f"config.json must name one architecture, not {names!r}")
    family = FAMILIES.get(names[0])
    if family is None:
        raise UnsupportedCheckpoint(f"architecture {names[0]} is not supported; known: {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise UnsupportedCheckpoint("quantization_config: quantised safetensors are not supported")
    try:
        return _decoder(names[0], family, {**config, **_end_tokens(config, generation or {})})
    except KeyError as error:
        raise UnsupportedCheckpoint(f"config.json lacks {error.args[0]}") from None
    except UnsupportedCheckpoint:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UnsupportedCheckpoint(f"config.json has a value of the wrong kind: {error}") from None


def _decoder(architecture: str, family: Family, given: Mapping[str, Any]) -> ModelConfig:
    config = {**family.defaults, **given, **family.always}
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedCheckpoint(f"hidden_act {config['hidden_act']!r} is not supported; allowed: silu")
    num_heads = int(config["num_attention_heads"])
    max_position = int(config.get("max_position_embeddings", 2048))
    _refuse_window(config, max_position)
    theta, scaling = rope_settings(config)
    if scaling is not None and scaling.kind == "yarn":  # published configs state the one or the other
        max_position = max(max_position, int(scaling.original_max_position * scaling.factor))
    flags = {**family.flags, **family.read_flags(config)}
    if "partial_rotary_factor" not in flags and _partial_rotary(config)["partial_rotary_factor"] != 1.0:
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
            max_position=max_position,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias,
            out_bias=bool(config.get("attention_out_bias", attention_bias)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            dtype=_dtype(config),
            eos_token_ids=config["eos_token_ids"],
            bos_token_id=config.get("bos_token_id"),
            **flags,
        )
    )


def _refuse_window(config: Mapping[str, Any], max_position: int) -> None:
    """A window that every context fits into is none at all; any other would need attention that skips tokens."""
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    if window is not None and int(window) < max_position:
        raise UnsupportedCheckpoint(
            f"sliding_window ({window}) is not supported where it is smaller than "
            f"max_position_embeddings ({max_position})"
        )


def rope_settings(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (4)."""
    parameters = _rope_parameters(config)
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position=int(parameters["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return theta, _yarn(parameters, int(config.get("max_position_embeddings", 2048)))
    raise UnsupportedCheckpoint(
        f"rope_type {kind!r} is not supported; allowed: default, linear, llama3, yarn"
    )


def _yarn(parameters: Mapping[str, Any], max_position: int) -> RopeScaling:
    factor = float(parameters["factor"])
    if factor < 1.0:
        raise UnsupportedCheckpoint(f"factor of rope_type yarn must be at least 1, not {factor}")
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        some, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = _mscale(factor, 1.0)
        if some and all_dim:
            attention_factor = _mscale(factor, float(some)) / _mscale(factor, float(all_dim))
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=int(parameters.get("original_max_position_embeddings") or max_position),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(attention_factor),
    )


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0


def checked(config: ModelConfig) -> ModelConfig:
    """The same config, or `UnsupportedCheckpoint` when its sizes contradict each other."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(config, name) < 1:
            raise UnsupportedCheckpoint(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedCheckpoint(
            f"num_attention_heads ({config.num_heads}) must be a multiple of "
            f"num_key_value_heads ({config.num_kv_heads})"
        )
    if config.head_dim < 2 or config.head_dim % 2:
        raise UnsupportedCheckpoint(f"head_dim must be even, not {config.head_dim}")
    if not 2 <= config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
        raise UnsupportedCheckpoint(
            f"partial_rotary_factor {config.partial_rotary_factor} of head_dim {config.head_dim} must be "
            f"an even number of channels"
        )
    return config


def _end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    found = generation.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return {"eos_token_ids": tuple(int(token_id) for token_id in ids)}


def _dtype(config: Mapping[str, Any]) -> DTypeName:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise UnsupportedCheckpoint(f"dtype {name} is not supported; allowed: bfloat16, float16, float32")
    return cast(DTypeName, name)
