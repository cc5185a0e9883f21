"""The config.json files that repositories publish, shortened to what a model is made of, and what they become."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.config_json import model_config
from engine.model_config import MixtureOfExperts, ModelConfig, RopeScaling, UnsupportedCheckpoint
from engine.quantisation import read_quantisation

GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
PYTHIA_70M: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
FALCON_7B: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}
FALCON_40B = {
    **FALCON_7B,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
FALCON_RW_1B = {
    **FALCON_7B,
    "alibi": True,
    "bias": True,
    "hidden_size": 2048,
    "multi_query": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def block(config: ModelConfig) -> tuple[Any, ...]:
    """What shape of block it is."""
    return config.norm_kind, config.norm_position, config.parallel, config.gated_mlp, config.activation


def sizes(config: ModelConfig) -> tuple[int, ...]:
    return (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )


def biases(config: ModelConfig) -> tuple[bool, ...]:
    return config.qkv_bias, config.out_bias, config.mlp_bias, config.norm_bias


def test_gpt2() -> None:
    config = model_config(GPT2)
    assert block(config) == ("layer", "before", False, False, "gelu_tanh")
    assert sizes(config) == (768, 3072, 12, 12, 64)
    assert biases(config) == (True, True, True, True)
    assert (config.positions, config.max_position, config.tied_embeddings) == ("learned", 1024, True)
    assert (config.storage.qkv, config.storage.transposed, config.eos_token_ids) == (
        "stacked",
        True,
        (50256,),
    )
    assert model_config({**GPT2, "n_inner": 100}).intermediate_size == 100


def test_pythia_70m() -> None:
    config = model_config(PYTHIA_70M)
    assert block(config) == ("layer", "before", True, False, "gelu")
    assert sizes(config) == (512, 2048, 8, 8, 64)
    assert biases(config) == (True, True, True, True)
    assert (config.positions, config.rotary_dim, config.rope_theta) == ("rope", 16, 10000.0)
    assert (config.storage.qkv, config.tied_embeddings) == ("grouped", False)
    other = model_config(
        {**PYTHIA_70M, "use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 500}
    )
    assert (other.parallel, other.rotary_dim, other.rope_theta) == (False, 64, 500.0)
    new = {key: value for key, value in PYTHIA_70M.items() if not key.startswith("rotary")}
    rope = {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5}
    assert model_config({**new, "rope_parameters": rope}).rotary_dim == 32
    assert model_config(new).rotary_dim == 16  # a quarter, where nothing is said


def test_falcon_7b() -> None:
    config = model_config(FALCON_7B)
    assert block(config) == ("layer", "shared", True, False, "gelu")
    assert sizes(config) == (4544, 4 * 4544, 71, 1, 64)
    assert biases(config) == (False, False, False, True)
    assert (config.positions, config.max_position, config.tied_embeddings) == ("rope", 2048, True)
    first_words = {"n_head": 71, "n_layer": 32}
    short = {k: v for k, v in FALCON_7B.items() if k not in ("num_attention_heads", "num_hidden_layers")}
    assert model_config({**short, **first_words}) == config


def test_falcon_40b() -> None:
    config = model_config(FALCON_40B)
    assert block(config) == ("layer", "before", True, False, "gelu")
    assert sizes(config) == (8192, 4 * 8192, 128, 8, 64)
    assert config.storage.qkv == "grouped"
    assert model_config({**FALCON_40B, "num_ln_in_parallel_attn": 1}).norm_position == "shared"


def test_falcon_rw_1b() -> None:
    config = model_config(FALCON_RW_1B)
    assert block(config) == ("layer", "before", False, False, "gelu")
    assert sizes(config) == (2048, 8192, 32, 32, 64)
    assert biases(config) == (True, True, True, True)
    assert config.positions == "alibi"


def test_mixtral_8x7b() -> None:
    config = model_config(MIXTRAL_8X7B)
    assert block(config) == ("rms", "before", False, True, "silu")
    assert sizes(config) == (4096, 14336, 32, 8, 128)
    assert config.moe == MixtureOfExperts(
        num_experts=8, num_per_token=2, intermediate_size=14336, normalised=True
    )
    assert (config.rope_theta, config.max_position) == (1e6, 32768)


def test_qwen3_30b_a3b() -> None:
    config = model_config(QWEN3_30B_A3B)
    assert block(config) == ("rms", "before", False, True, "silu")
    assert sizes(config) == (2048, 6144, 32, 4, 128)
    assert config.moe == MixtureOfExperts(
        num_experts=128, num_per_token=8, intermediate_size=768, normalised=True
    )
    assert (config.qk_norm, config.qkv_bias, config.max_position) == ("head", False, 40960)
    some = {**QWEN3_30B_A3B, "decoder_sparse_step": 3, "mlp_only_layers": [5], "num_hidden_layers": 9}
    assert model_config(some).moe == MixtureOfExperts(
        num_experts=128,
        num_per_token=8,
        intermediate_size=768,
        normalised=True,
        dense_layers=(0, 1, 3, 4, 5, 6, 7),
    )
    assert model_config({**QWEN3_30B_A3B, "num_experts": 0}).moe is None


def test_gpt_oss_20b() -> None:
    config = model_config(GPT_OSS_20B, {"eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999})
    assert block(config) == ("rms", "before", False, True, "swiglu_oai")
    assert sizes(config) == (2880, 2880, 64, 8, 64)
    assert biases(config) == (True, True, True, False)
    assert (config.attention_sinks, config.windows) == (True, (128, None) * 12)
    assert config.moe == MixtureOfExperts(
        num_experts=32, num_per_token=4, intermediate_size=2880, normalised=True, router_bias=True
    )
    assert (config.rope_theta, config.max_position) == (150000.0, 131072)
    assert config.rope_scaling == RopeScaling(
        kind="yarn",
        factor=32.0,
        original_max_position=4096,
        truncate=False,
        attention_factor=0.1 * math.log(32) + 1,
    )
    assert config.eos_token_ids == (200002, 199999, 200012)
    assert (config.dtype, config.tied_embeddings) == ("bfloat16", False)
    assert read_quantisation(GPT_OSS_20B) is not None
    left_out = ("layer_types", "rope_scaling", "rope_theta", "head_dim", "sliding_window", "attention_bias")
    short = {name: value for name, value in GPT_OSS_20B.items() if name not in left_out}
    assert model_config(short) == model_config(GPT_OSS_20B)  # as transformers fills them in


@pytest.mark.parametrize(
    ("published", "fields", "named"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"activation_function": "quick_gelu"}, "quick_gelu"),
        (FALCON_7B, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
        (FALCON_40B, {"num_kv_heads": 7}, "num_key_value_heads"),
        (PYTHIA_70M, {"rotary_pct": 0.24}, "partial_rotary_factor"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 0}, "num_experts_per_tok"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "wrong kind"),
        (GPT_OSS_20B, {"swiglu_limit": 6.0}, "swiglu_limit 6.0 is not supported; allowed: 7.0"),
        (GPT_OSS_20B, {"swiglu_alpha": 1.0}, "swiglu_alpha 1.0"),
        (GPT_OSS_20B, {"sliding_window": None}, "layer_types has sliding_attention, but no sliding_window"),
        (GPT_OSS_20B, {"num_experts_per_tok": 33}, "num_experts_per_tok must be 1 to 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_computed_is_named(
    published: dict[str, Any], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=named):
        model_config({**published, **fields})
