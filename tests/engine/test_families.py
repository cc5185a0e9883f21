"""config.json becomes a ModelConfig, or is refused by the name of what is not supported."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config_json import model_config
from engine.model_config import RopeScaling, UnsupportedCheckpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": None}


def test_sizes_and_flags_of_an_old_llama() -> None:
    config = model_config(LLAMA)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.dtype, config.eos_token_ids, config.rope_theta) == ("bfloat16", (2,), 10000.0)
    assert not any((config.tied_embeddings, config.qkv_bias, config.out_bias, config.mlp_bias))


def test_kv_heads_and_head_dim_have_defaults_and_may_be_null() -> None:
    config = model_config({**LLAMA, "num_key_value_heads": None, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert model_config({**LLAMA, "head_dim": 80}).head_dim == 80


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    ],
)
def test_llama3_rope_in_the_words_of_both_transformers(fields: dict[str, Any]) -> None:
    config = model_config({**LLAMA, **fields})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(kind="llama3", factor=8.0)


def test_linear_rope() -> None:
    config = model_config({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


def test_yarn_reaches_as_far_as_it_is_stretched() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    config = model_config({**LLAMA, "rope_scaling": rope})
    assert config.max_position == 8192
    assert model_config({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}).max_position == 4096
    assert model_config({**LLAMA, "rope_scaling": rope, "max_position_embeddings": 9000}).max_position == 9000


def test_generation_config_decides_the_end_tokens() -> None:
    assert model_config(LLAMA, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert model_config(LLAMA, {"temperature": 1.0}).eos_token_ids == (2,)
    assert model_config({**LLAMA, "eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["FancyForCausalLM"]}, "FancyForCausalLM"),
        ({"architectures": None}, "architecture"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "dynamic.*length of its whole sequence"),
        ({"rope_scaling": {"rope_type": "ntk"}}, "ntk"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"torch_dtype": "float64"}, "float64"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"hidden_size": "many"}, "wrong kind"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "wrong kind"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=named):
        model_config({**LLAMA, **fields})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="vocab_size"):
        model_config({key: value for key, value in LLAMA.items() if key != "vocab_size"})


def test_flags_that_follow_from_the_name_are_not_read() -> None:
    fields = {**LLAMA, "attention_bias": False, "mlp_bias": True}
    config = model_config({**fields, "architectures": ["Qwen2ForCausalLM"]})
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, False, False)
    config = model_config({**fields, "attention_bias": True, **MISTRAL})
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (False, False, False)


def test_fields_left_out_are_those_of_transformers() -> None:
    short = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    del short["max_position_embeddings"]
    config = model_config({**short, "num_attention_heads": 16, "hidden_size": 128, **MISTRAL})
    assert (config.num_kv_heads, config.max_position, config.norm_eps) == (8, 131072, 1e-6)


def test_qwen3_norms_each_head_and_knows_its_size() -> None:
    config = model_config({**LLAMA, "architectures": ["Qwen3ForCausalLM"], "attention_bias": True})
    assert (config.qk_norm, config.head_dim) == ("head", 128)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, True, False)
    assert model_config(LLAMA).qk_norm is None


def test_olmo2_norms_afterwards_and_all_heads_as_one() -> None:
    short = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}
    config = model_config({**short, "architectures": ["Olmo2ForCausalLM"]})
    assert (config.qk_norm, config.norm_position, config.norm_eps) == ("all", "after", 1e-5)
    assert model_config(LLAMA).norm_position == "before"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (3, 7)),
        ({"no_rope_layer_interval": 3}, (2, 5)),
        ({"no_rope_layers": None}, (3, 7)),
        ({"no_rope_layers": [0, 1, 1, 1, 0, 1, 1, 1, 0, 0]}, (0, 4)),  # it may be longer than the model
    ],
    ids=str,
)
def test_smollm3_knows_the_layers_that_rotate_nothing(
    fields: dict[str, Any], expected: tuple[int, ...]
) -> None:
    base = {**LLAMA, "num_hidden_layers": 8, **fields}
    config = model_config({**base, "architectures": ["SmolLM3ForCausalLM"]})
    assert (config.no_rope_layers, config.rope_theta, config.tied_embeddings) == (expected, 2e6, True)
    assert model_config(base).no_rope_layers == ()


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"no_rope_layers": [1]}, "no_rope_layers"), ({"no_rope_layer_interval": 0}, "wrong kind")],
)
def test_smollm3_with_too_few_words_about_its_layers_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=named):
        model_config({**LLAMA, "architectures": ["SmolLM3ForCausalLM"], **fields})


PHI3 = {**LLAMA, "architectures": ["Phi3ForCausalLM"]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 16),
        ({"partial_rotary_factor": 0.75}, 12),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, 8),
        ({"head_dim": 40, "partial_rotary_factor": 0.4}, 16),
    ],
    ids=str,
)
def test_phi3_rotates_the_first_channels(fields: dict[str, Any], expected: int) -> None:
    config = model_config({**PHI3, **fields})
    assert (config.rotary_dim, config.storage.qkv, config.qkv_bias) == (expected, "stacked", False)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}},
            "short_factor",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [0] * 8}},
            "long_factor",
        ),
        ({"rope_scaling": {"type": "su"}}, "su"),
        ({"partial_rotary_factor": 0.7}, "partial_rotary_factor"),  # 11 channels
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
    ],
    ids=str,
)
def test_phi3_that_rotates_otherwise_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=named):
        model_config({**PHI3, **fields})


def test_granite_reads_its_four_multipliers() -> None:
    fields = {"embedding_multiplier": 12, "attention_multiplier": 0.5, "residual_multiplier": 0.25}
    config = model_config({**LLAMA, **fields, "architectures": ["GraniteForCausalLM"]})
    assert (config.embedding_multiplier, config.attention_multiplier) == (12.0, 0.5)
    assert (config.residual_multiplier, config.logits_scaling) == (0.25, 1.0)
    assert model_config({**LLAMA, **fields}).attention_multiplier is None
