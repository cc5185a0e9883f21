"""Which layers of a family see only a window, Gemma's flags, and LongRoPE, as published configurations say it."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config_json import model_config
from engine.model_config import ModelConfig, UnsupportedCheckpoint

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
SLIDING, FULL = "sliding_attention", "full_attention"


def read(family: str, **fields: Any) -> ModelConfig:
    return model_config({**SIZES, "architectures": [f"{family}ForCausalLM"], **fields})


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("Mistral", {}, (4096,) * 4),  # transformers fills it in
        ("Mistral", {"sliding_window": 64, "layer_types": [FULL, SLIDING] * 2}, (None, 64) * 2),  # Ministral
        ("Mistral", {"sliding_window": 64, "layer_types": [FULL] * 4}, ()),
        ("Phi3", {"sliding_window": 64, "layer_types": [FULL] * 4}, (64,) * 4),  # it has no such field
        ("Mistral", {"sliding_window": None}, ()),
        ("Phi3", {"sliding_window": 2047}, (2047,) * 4),
        ("Phi3", {}, ()),
        ("Qwen2", {"sliding_window": 64, "max_window_layers": 1}, ()),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64}, ()),  # 28 layers come first
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 4096)),
        (
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
            (9, None, None, 9),
        ),
        ("SmolLM3", {"sliding_window": 64}, ()),
        (
            "SmolLM3",
            {"sliding_window": 64, "use_sliding_window": True, "no_rope_layer_interval": 2},
            (None, 64, None, 64),
        ),
        ("Gemma2", {"sliding_window_pattern": 3}, (4096, None, 4096, None)),  # which is Gemma 3's
        ("Gemma2", {"sliding_window": 5, "layer_types": [FULL, FULL, SLIDING, FULL]}, (None, None, 5, None)),
        ("Gemma3", {"num_hidden_layers": 7, "sliding_window": 512}, (512,) * 5 + (None, 512)),
        ("Gemma3", {"sliding_window_pattern": 2, "sliding_window": 512}, (512, None, 512, None)),
        ("Mixtral", {}, ()),
        ("Mixtral", {"sliding_window": 7}, (7,) * 4),
        ("Qwen3Moe", {"sliding_window": 64}, ()),
        ("Qwen3Moe", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, (64,) * 4),
        ("Llama", {"sliding_window": 64, "use_sliding_window": True}, ()),  # transformers ignores it, too
        ("Olmo2", {"sliding_window": 64, "layer_types": [SLIDING] * 4}, ()),
    ],
    ids=str,
)
def test_each_layer_has_its_window(
    family: str, fields: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(family, **fields).windows == windows


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("Mistral", {"sliding_window": 0}, "sliding_window"),
        ("Mistral", {"sliding_window": "wide"}, "wrong kind"),
        ("Qwen2", {"layer_types": [SLIDING] * 4}, "no sliding_window is in effect"),
        ("Gemma2", {"sliding_window": None}, "no sliding_window is in effect"),
        ("Gemma2", {"layer_types": [SLIDING] * 3}, "3 entries for 4 layers"),
        ("Gemma2", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ("Gemma2", {"hidden_activation": "tanh"}, "tanh"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (
            "Gemma3",
            {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}, FULL: {}}},
            "linear.*sliding_attention",
        ),
        ("Qwen3", {"rope_parameters": {SLIDING: {}, FULL: {}}}, "rope_parameters"),
    ],
    ids=str,
)
def test_what_contradicts_itself_or_is_not_supported_is_named(
    family: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=named):
        read(family, **fields)


def published(architecture: str, sizes: tuple[int, int, int, int, int, int], **fields: Any) -> ModelConfig:
    """sizes: vocabulary, hidden, intermediate, layers, heads, key/value heads."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = dict(zip((*names, "num_key_value_heads"), sizes, strict=True))
    return model_config({"architectures": [architecture], "torch_dtype": "bfloat16", **config, **fields})


def test_mistral_7b_v0_1() -> None:
    config = published(
        "MistralForCausalLM",
        (32000, 4096, 14336, 32, 32, 8),
        hidden_act="silu",
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
    )
    assert (config.windows, config.max_position, config.head_dim) == ((4096,) * 32, 32768, 128)


def test_phi_3_mini() -> None:
    sizes = (32064, 3072, 8192, 32, 32, 32)
    common = {"hidden_act": "silu", "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
    short = published(
        "Phi3ForCausalLM",
        sizes,
        max_position_embeddings=4096,
        sliding_window=2047,
        rope_scaling=None,
        **common,
    )
    assert (short.windows, short.rope_scaling) == ((2047,) * 32, None)
    factors = {"short_factor": [1.05] * 48, "long_factor": [1.5] * 48}
    for kind in ("longrope", "su", "yarn"):  # one after the other the names of the same thing
        long = published(
            "Phi3ForCausalLM",
            sizes,
            max_position_embeddings=131072,
            sliding_window=262144,
            rope_scaling={"type": kind, **factors},
            **common,
        )
        scaling = long.rope_scaling
        assert scaling is not None
        assert (scaling.kind, scaling.original_max_position, scaling.factor) == ("longrope", 4096, 32.0)
        assert scaling.attention_factor == pytest.approx(1.1902380714238083)  # sqrt(1 + log 32 / log 4096)
        assert (scaling.short_factors, scaling.long_factors) == ((1.05,) * 48, (1.5,) * 48)


def test_gemma_2_2b() -> None:
    config = published(
        "Gemma2ForCausalLM",
        (256000, 2304, 9216, 26, 8, 4),
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        max_position_embeddings=8192,
        rope_theta=10000.0,
        sliding_window=4096,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        cache_implementation="hybrid",
    )
    assert config.windows == (4096, None) * 13
    assert (config.attention_softcap, config.logits_softcap, config.attention_multiplier) == (
        50.0,
        30.0,
        0.0625,
    )
    assert (config.embedding_multiplier, config.rounds_embedding_multiplier) == (48.0, True)
    assert (config.norm_offset, config.norm_position, config.activation) == (1.0, "both", "gelu_tanh")
    assert (config.tied_embeddings, config.qk_norm, config.windowed_rope_theta) == (True, None, None)


def test_gemma_3_1b() -> None:
    fields = {
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
    }
    sizes = (262144, 1152, 6912, 26, 4, 1)
    old = {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None}
    config = published("Gemma3ForCausalLM", sizes, **fields, **old)
    assert [i for i, window in enumerate(config.windows) if window is None] == [5, 11, 17, 23]
    assert (config.rope_theta, config.rope_scaling, config.windowed_rope_theta) == (1e6, None, 1e4)
    assert (config.qk_norm, config.logits_softcap, config.attention_softcap) == ("head", None, None)
    linear = {"rope_type": "linear", "factor": 8.0}
    scaled = published("Gemma3ForCausalLM", sizes, **fields, **{**old, "rope_scaling": linear})
    new = {FULL: {**linear, "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    assert scaled == published("Gemma3ForCausalLM", sizes, **fields, rope_parameters=new)
    assert scaled.rope_scaling is not None
    assert (scaled.rope_scaling.kind, scaled.rope_scaling.factor) == ("linear", 8.0)
    assert published("Gemma3ForCausalLM", sizes, **fields) == config  # transformers fills the same in
