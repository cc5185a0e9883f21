"""Families as data: how the `config.json` of one architecture becomes a `ModelConfig`.

Owns the reading of configuration fields and the refusal of what the decoder cannot compute. Knows no files
and no tensors. A new family is one entry in `FAMILIES`; no other code branches on its name. What a family says in
words of its own is read in `family_fields`, how it names its tensors stands in `family_storage`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from engine import family_fields, family_storage
from engine.config_sizes import checked
from engine.field_kinds import check_kinds
from engine.model_config import Activation, ModelConfig, Storage, StoredDType, UnsupportedCheckpoint
from engine.rope_settings import rope_settings
from engine.windows import (
    Windowed,
    all_but_every,
    all_layers,
    by_layer_types,
    every_layer,
    upper_layers,
    windows,
)

__all__ = ["FAMILIES", "Family", "UnsupportedCheckpoint", "model_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture is beyond a plain Llama.

    `words`: its names for fields of Llama. `defaults`: fields that its config.json may leave out, as transformers
    fills them in. `fields`: those of Llama that follow from others. `always`: fields in which its config.json has no
    say. `only`: fields that change what is computed, each with the one value that is supported. `flags`: those of
    `ModelConfig` that follow from the name. `read_flags`: those that it reads from fields of its own. `windowed`:
    which layers attend within `sliding_window`; None: no layer, whatever the fields say.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    always: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    read_flags: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    windowed: Windowed | None = None


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
_LAYER_NORMS = {"norm_kind": "layer", "norm_bias": True, "gated_mlp": False}
# Fields by Llama's name that are ignored where the family has a name of its own for them: published files have both.
# Sizes are known to transformers by both names.
_IGNORED = frozenset(
    {"hidden_act", "rms_norm_eps", "intermediate_size", "rope_theta", "partial_rotary_factor"}
)
_NO_BIAS = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}

_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_GEMMA_FLAGS = {"norm_offset": 1.0, "norm_position": "both", "rounds_embedding_multiplier": True}

FAMILIES: Mapping[str, Family] = {
    # Llama 1 to 3 and its many relatives under the same name, SmolLM2 among them
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        always={**_NO_BIAS, "use_sliding_window": True},
        windowed=by_layer_types(all_layers),  # Ministral's has layer_types
    ),
    "Qwen2ForCausalLM": Family(
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, **_QWEN_WINDOW},
        always={**_NO_BIAS, "attention_bias": True},
        windowed=by_layer_types(upper_layers),
    ),
    "Qwen3ForCausalLM": Family(
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            **_QWEN_WINDOW,
        },
        always={"mlp_bias": False},
        flags={"qk_norm": "head"},
        windowed=by_layer_types(upper_layers),
    ),
    "Olmo2ForCausalLM": Family(
        defaults={"rms_norm_eps": 1e-5},
        always={"mlp_bias": False},
        flags={"qk_norm": "all", "norm_position": "after"},
    ),
    "SmolLM3ForCausalLM": Family(
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        read_flags=family_fields.no_rope_layers,
        windowed=by_layer_types(family_fields.windowed_without_rope),
    ),
    "Phi3ForCausalLM": Family(
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        always={**_NO_BIAS, "use_sliding_window": True},
        flags={"storage": Storage(qkv="stacked", gate_up="stacked")},
        read_flags=family_fields.partial_rotary,
        windowed=every_layer,
    ),
    "GraniteForCausalLM": Family(read_flags=family_fields.multipliers),
    "SeedOssForCausalLM": Family(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
        },
    ),
    "Gemma2ForCausalLM": Family(
        words=family_fields.GEMMA_WORDS,
        defaults={
            **family_fields.GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        always={"mlp_bias": False, "use_sliding_window": True, "sliding_window_pattern": 2},
        flags=_GEMMA_FLAGS,
        read_flags=family_fields.gemma_flags,
        windowed=by_layer_types(all_but_every(2)),
    ),
    "Gemma3ForCausalLM": Family(
        words=family_fields.GEMMA_WORDS,
        defaults={
            **family_fields.GEMMA_DEFAULTS,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
        },
        # transformers reads the last one only where the layers do not differ
        always={
            "mlp_bias": False,
            "use_sliding_window": True,
            "original_max_position_embeddings": None,
        },
        only={"attn_logit_softcapping": None},  # transformers reads it and ignores it
        flags={**_GEMMA_FLAGS, "qk_norm": "head"},
        read_flags=family_fields.gemma3_flags,
        windowed=by_layer_types(all_but_every(6)),
    ),
    "GPT2LMHeadModel": Family(
        words=family_fields.GPT2_WORDS,
        defaults={
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        fields=family_fields.four_times_wide,
        always={
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": None,
        },
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        flags={**_LAYER_NORMS, "positions": "learned", "storage": family_storage.GPT2_STORAGE},
    ),
    "GPTNeoXForCausalLM": Family(
        words=family_fields.NEOX_WORDS,
        defaults={
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "attention_bias": True,
        },
        always={"mlp_bias": True, "num_key_value_heads": None},
        flags={**_LAYER_NORMS, "storage": family_storage.NEOX_STORAGE},
        read_flags=family_fields.neox_flags,
    ),
    "FalconForCausalLM": Family(
        words=family_fields.FALCON_WORDS,
        defaults={"hidden_act": "gelu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        fields=family_fields.falcon_fields,
        only={"apply_residual_connection_post_layernorm": False},
        flags={**_LAYER_NORMS, "storage": family_storage.FALCON_STORAGE},
        read_flags=family_fields.falcon_flags,
    ),
    "MixtralForCausalLM": Family(
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        always={**_NO_BIAS, "use_sliding_window": True},
        flags={"storage": family_storage.MIXTRAL_STORAGE},
        read_flags=family_fields.mixtral_experts,
        windowed=every_layer,
    ),
    "Qwen3MoeForCausalLM": Family(
        words={"num_experts": "num_local_experts"},
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            **_QWEN_WINDOW,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        always={"mlp_bias": False},
        flags={"qk_norm": "head"},
        read_flags=family_fields.qwen3_experts,
        windowed=every_layer,
    ),
    "GptOssForCausalLM": Family(
        words={"num_experts": "num_local_experts"},
        defaults=family_fields.GPT_OSS_DEFAULTS,
        fields=family_fields.gpt_oss_fields,
        # transformers ignores the first of them
        always={
            "hidden_act": "silu",
            "mlp_bias": True,
            "use_sliding_window": True,
            "sliding_window_pattern": 2,
        },
        only={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        flags={
            "activation": "swiglu_oai",
            "attention_sinks": True,
            "storage": family_storage.GPT_OSS_STORAGE,
        },
        read_flags=family_fields.gpt_oss_experts,
        windowed=by_layer_types(all_but_every(2)),
    ),
}

# Architectures that one might expect here, and why they are not supported
REFUSED: Mapping[str, str] = {
    "Gemma3ForConditionalGeneration": "its checkpoint holds a vision tower beside the text model, and images are "
    "not supported; the text model alone is Gemma3ForCausalLM",
}


def model_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`config.json` (and `generation_config.json`, whose end-of-sequence ids win) as a `ModelConfig`.

    Raises `UnsupportedCheckpoint` naming the architecture or the field that is not supported.
    """
    architecture = only_architecture(config)
    family = FAMILIES.get(architecture)
    if architecture in REFUSED:
        raise UnsupportedCheckpoint(f"architecture {architecture} is not supported: {REFUSED[architecture]}")
    if family is None:
        raise UnsupportedCheckpoint(
            f"architecture {architecture} is not supported; known: {', '.join(FAMILIES)}"
        )
    check_kinds(config)
    try:
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
    flags = {"activation": _ACTIVATIONS[activation], **family.flags, **family.read_flags(config)}
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
            max_position=max_position,
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
