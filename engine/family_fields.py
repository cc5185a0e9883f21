"""What single families say in `config.json` in words of their own, read into Llama's words or into flags.

Owns these readings. Knows no family as such: an entry of `families.FAMILIES` says which of them it takes. Knows no
tensors (`family_storage`). Raises KeyError, TypeError or ValueError for a value that cannot be read,
`UnsupportedCheckpoint` for one that is not supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.model_config import MixtureOfExperts, UnsupportedCheckpoint
from engine.rope_settings import rope_parameters, rope_settings, windowed_rope_theta
from engine.windows import all_but_every, by_layer_types

Fields = Mapping[str, Any]

GPT2_WORDS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "rms_norm_eps",
}
NEOX_WORDS = {
    "layer_norm_eps": "rms_norm_eps",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}
GLM_DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
GEMMA_WORDS = {"hidden_activation": "hidden_act"}
GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA3_SIZES = {  # of the text model inside: published files say what differs from these
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
FALCON_WORDS = {
    "n_embed": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "activation": "hidden_act",
    "layer_norm_epsilon": "rms_norm_eps",
}

GPT_OSS_DEFAULTS = {
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
}


def four_times_wide(config: Fields) -> Fields:
    """The width of an MLP where config.json does not say it."""
    return {"intermediate_size": config.get("intermediate_size") or 4 * int(config["hidden_size"])}


def falcon_fields(config: Fields) -> Fields:
    """kv heads and biases; `num_kv_heads` counts only where `new_decoder_architecture` is set."""
    heads = config["num_attention_heads"]
    if config.get("new_decoder_architecture"):
        kv_heads = config.get("num_kv_heads") or heads
    else:
        kv_heads = 1 if config.get("multi_query", True) else heads
    bias = bool(config.get("bias", False))
    return {
        **four_times_wide(config),
        "num_key_value_heads": kv_heads,
        "attention_bias": bias,
        "mlp_bias": bias,
    }


def falcon_flags(config: Fields) -> Fields:
    new = bool(config.get("new_decoder_architecture"))
    parallel = new or bool(config.get("parallel_attn", True))
    norms = config.get("num_ln_in_parallel_attn") or 2
    shared = parallel and not (new and int(norms) == 2)
    return {
        "parallel": parallel,
        "norm_position": "shared" if shared else "before",
        "positions": "alibi" if config.get("alibi") else "rope",
    }


def neox_flags(config: Fields) -> Fields:
    return {"parallel": bool(config.get("use_parallel_residual", True)), **partial_rotary(config)}


def no_rope_layers(config: Fields) -> Fields:
    num_layers, interval = int(config["num_hidden_layers"]), config.get("no_rope_layer_interval", 4)
    uses_rope = config.get("no_rope_layers")  # despite the name, 1 means that the layer rotates
    if uses_rope is None:
        uses_rope = [(i + 1) % int(interval) for i in range(num_layers)]
    if len(uses_rope) < num_layers:
        raise UnsupportedCheckpoint(f"no_rope_layers has {len(uses_rope)} entries for {num_layers} layers")
    return {"no_rope_layers": tuple(i for i in range(num_layers) if not uses_rope[i])}


def windowed_without_rope(config: Fields, layer: int) -> bool:
    return config["sliding_window"] is not None and layer in no_rope_layers(config)["no_rope_layers"]


def partial_rotary(config: Fields) -> Fields:
    factor = rope_parameters(config).get("partial_rotary_factor") or config.get("partial_rotary_factor")
    return {"partial_rotary_factor": float(factor or 1.0)}


def multipliers(config: Fields) -> Fields:
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    return {name: float(config.get(name, 1.0)) for name in names}


def ministral3_fields(config: Fields) -> Fields:
    """Where config.json describes no rope, the one that transformers fills in."""
    if config.get("rope_parameters") is not None or config.get("rope_scaling"):
        return {}
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    }


def original_positions(config: Fields) -> Fields:
    """Ministral 3 scales queries by their position beyond the original context. That is not computed here, so a
    sequence ends with it."""
    rope = rope_parameters(config)
    if not rope.get("llama_4_scaling_beta"):
        return {}
    return {"max_position": int(rope["original_max_position_embeddings"])}


def gemma_flags(config: Fields) -> Fields:
    if config.get("use_bidirectional_attention"):
        raise UnsupportedCheckpoint("use_bidirectional_attention is not supported")
    return {
        "embedding_multiplier": float(config["hidden_size"]) ** 0.5,
        "attention_multiplier": float(config["query_pre_attn_scalar"]) ** -0.5,
        "attention_softcap": _softcap(config, "attn_logit_softcapping"),
        "logits_softcap": _softcap(config, "final_logit_softcapping"),
    }


def gemma3_flags(config: Fields) -> Fields:
    return {**gemma_flags(config), "windowed_rope_theta": windowed_rope_theta(config)}


def scaled_without_window(config: Fields) -> Fields:
    """Rope is scaled in the layers that see everything; those with a window have its theta alone (OLMo 3)."""
    return {"windowed_rope_theta": windowed_rope_theta(config) or rope_settings(config)[0]}


exaone4_windows = by_layer_types(
    lambda config, layer: config["sliding_window"] is not None and all_but_every(4)(config, layer)
)


cohere2_windows = by_layer_types(all_but_every(4))


def exaone4_flags(config: Fields) -> Fields:
    """Where config.json has a window, only layers with it rotate."""
    return {} if config["sliding_window"] is None else _rotated_within(exaone4_windows(config))


def cohere2_flags(config: Fields) -> Fields:
    """Only layers with a window rotate; logits are multiplied by a number, not divided."""
    scaling = 1.0 / float(config["logit_scale"])
    return {"logits_scaling": scaling, **_rotated_within(cohere2_windows(config))}


def _rotated_within(inside: Sequence[bool]) -> Fields:
    """`inside`: whether each layer has a window."""
    return {"no_rope_layers": tuple(i for i, within in enumerate(inside) if not within)}


def _softcap(config: Fields, name: str) -> float | None:
    value = config.get(name)
    if value is not None and not float(value) > 0:
        raise UnsupportedCheckpoint(f"{name} must be above 0 or null, not {value}")
    return None if value is None else float(value)


def gpt_oss_fields(config: Fields) -> Fields:
    """One field for all biases of attention; where config.json describes no rope, the one that transformers fills in;
    and the dtype, which published files leave out: that of the weights that are stored plainly."""
    fields: dict[str, Any] = {"attention_out_bias": config["attention_bias"]}
    if not config.get("dtype") and not config.get("torch_dtype"):
        fields["dtype"] = "bfloat16"
    if config.get("rope_parameters") is None and not config.get("rope_scaling"):
        fields["rope_parameters"] = {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    return fields


def gpt_oss_experts(config: Fields) -> Fields:
    """The softmax over the logits of a token's experts is that over all logits, divided by their sum."""
    return _experts(config, config["intermediate_size"], normalised=True, router_bias=True)


def mixtral_experts(config: Fields) -> Fields:
    return _experts(config, config["intermediate_size"], normalised=True)


def qwen3_experts(config: Fields) -> Fields:
    """Where there are 0 of them, all layers are dense."""
    step, only_mlp = int(config["decoder_sparse_step"]), set(config.get("mlp_only_layers") or ())
    dense = tuple(i for i in range(int(config["num_hidden_layers"])) if i in only_mlp or (i + 1) % step)
    normalised = bool(config["norm_topk_prob"])
    found = _experts(config, config["moe_intermediate_size"], normalised=normalised, dense_layers=dense)
    return found if int(config["num_local_experts"]) else {"moe": None}


def _experts(config: Fields, intermediate_size: Any, **flags: Any) -> Fields:
    moe = MixtureOfExperts(
        num_experts=int(config["num_local_experts"]),
        num_per_token=int(config["num_experts_per_tok"]),
        intermediate_size=int(intermediate_size),
        **flags,
    )
    return {"moe": moe}
