"""The families of GGUF files as data: llama.cpp's metadata in the words of a config.json.

Owns which architecture of llama.cpp is which of ours, what its keys are called and the refusal of keys whose meaning
the decoder does not compute. Knows no bytes. What a family computes is said in `families`, as for every checkpoint. A
new family is one entry in `GGUF_FAMILIES`, provided that the converter left its tensors as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config_json import model_config
from engine.model_config import ModelConfig, UnsupportedCheckpoint

ROPE_FACTORS = "rope_freqs.weight"
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that are matched before any split
# Added tokens that end a sample by their spelling, whatever the file says of them: llama.cpp's list (llama-vocab.cpp)
END_SPELLINGS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFamily:
    """`interleaved`: llama.cpp's converter lets the two halves of each head's rows of q and k alternate.
    `fields`: further keys, without the architecture in front → fields of config.json."""

    architecture: str
    interleaved: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)


_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
GGUF_FAMILIES: Mapping[str, GGUFFamily] = {
    "llama": GGUFFamily(architecture="LlamaForCausalLM", interleaved=True),  # Mistral calls itself so, too
    "qwen2": GGUFFamily(architecture="Qwen2ForCausalLM"),
    "qwen3": GGUFFamily(architecture="Qwen3ForCausalLM"),
    "phi3": GGUFFamily(architecture="Phi3ForCausalLM"),
    "olmo2": GGUFFamily(architecture="Olmo2ForCausalLM"),
    "granite": GGUFFamily(architecture="GraniteForCausalLM", interleaved=True, fields=_SCALES),
    "smollm3": GGUFFamily(architecture="SmolLM3ForCausalLM", interleaved=True),
    "seed_oss": GGUFFamily(architecture="SeedOssForCausalLM"),
}
_REQUIRED = {
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
}
_OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta"}
_UNKNOWN_MATHS = (
    *_SCALES,
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "expert_count",
    "final_logit_softcapping",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "use_parallel_residual",
)


def gguf_family(metadata: Mapping[str, Any]) -> GGUFFamily:
    """Raises `UnsupportedCheckpoint` for an architecture that is not known."""
    name = str(metadata.get("general.architecture"))
    if name not in GGUF_FAMILIES:
        raise UnsupportedCheckpoint(
            f"general.architecture is {name!r}, which is not supported; allowed: {', '.join(GGUF_FAMILIES)}"
        )
    return GGUF_FAMILIES[name]


def gguf_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Callable[[], NDArray[np.float32]],
) -> ModelConfig:
    """`shapes`: of the file's tensors, by their names there; `rope_factors`: reads the tensor `ROPE_FACTORS`.

    `dtype` is bfloat16: the quantised values carry no more. Raises `UnsupportedCheckpoint` naming the key.
    """
    family, prefix = gguf_family(metadata), f"{metadata['general.architecture']}."
    given = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key in _REQUIRED:
        if key not in given:
            raise UnsupportedCheckpoint(f"{prefix}{key} is missing")
    for key in _UNKNOWN_MATHS:
        if given.get(key) and key not in family.fields:
            raise UnsupportedCheckpoint(f"{prefix}{key} ({given[key]}) is not supported")
    if "token_embd.weight" not in shapes:
        raise UnsupportedCheckpoint("the tensor token_embd.weight is missing")
    try:
        config = {
            name: given[key]
            for key, name in {**_REQUIRED, **_OPTIONAL, **family.fields}.items()
            if given.get(key) is not None
        }
        _refuse_window(given, prefix)
        head_dim = int(given.get("attention.key_length") or _ratio(config))
        if given.get("attention.value_length", head_dim) != head_dim:
            raise UnsupportedCheckpoint(f"{prefix}attention.value_length must be {head_dim}, as that of keys")
        rotated = int(given.get("rope.dimension_count") or head_dim)
        config |= {
            "architectures": [family.architecture],
            "vocab_size": shapes["token_embd.weight"][0],
            "head_dim": head_dim,
            "tie_word_embeddings": "output.weight" not in shapes,
            "attention_bias": bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & shapes.keys()),
            "attention_out_bias": "blk.0.attn_output.bias" in shapes,
            "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
            "rope_scaling": _rope_scaling(given, prefix),
            "eos_token_id": _end_tokens(metadata),
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "dtype": "bfloat16",
        }
        if rotated != head_dim:  # the product of the two is rounded down
            config["partial_rotary_factor"] = (rotated + 0.5) / head_dim
        if ROPE_FACTORS in shapes:
            config["rope_scaling"] = _llama3(rope_factors(), head_dim, float(config.get("rope_theta", 1e4)))
        # no family's default applies: where the file says nothing, it is the context length
        original = (config["rope_scaling"] or {}).get("original_max_position_embeddings")
        config["original_max_position_embeddings"] = original
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, UnsupportedCheckpoint):
            raise
        raise UnsupportedCheckpoint(f"a {prefix}… key has a value of the wrong kind: {error}") from None
    return model_config(config)


def _ratio(config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _refuse_window(given: Mapping[str, Any], prefix: str) -> None:
    window, context = given.get("attention.sliding_window"), int(given["context_length"])
    if window is not None and 0 < int(window) < context:
        raise UnsupportedCheckpoint(
            f"{prefix}attention.sliding_window ({window}) is not supported where it is smaller than "
            f"context_length ({context})"
        )


def _end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    spelled = [
        token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, USER_DEFINED) and token in END_SPELLINGS
    ]
    return list(dict.fromkeys(int(token_id) for token_id in (*named, *spelled) if token_id is not None))


def _rope_scaling(given: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    kind = given.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedCheckpoint(
            f"{prefix}rope.scaling.type {kind!r} is not supported; allowed: none, linear, yarn"
        )
    names = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    if "rope.scaling.factor" not in given:
        raise UnsupportedCheckpoint(f"{prefix}rope.scaling.factor is missing")
    found = {name: given.get(f"rope.scaling.{key}") for key, name in names.items()}
    return {"rope_type": kind, **{name: value for name, value in found.items() if value is not None}}


def _llama3(stored: NDArray[np.float32], head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's files hold one divisor per frequency instead of the rule's parameters: accepted only if the published
    parameters give back exactly these divisors."""
    factor, low, high, original = round(float(stored.max()), 4), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    divisors = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != divisors.shape or not np.allclose(stored, divisors, rtol=1e-4):
        raise UnsupportedCheckpoint(f"{ROPE_FACTORS} does not follow Llama 3's rule")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
