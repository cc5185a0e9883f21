"""Of a checkpoint that sees as well, the text model is run: by published config.json files, and by what is stored.
That it says what transformers' whole model says is in `test_family_parity.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config_json import model_config
from engine.model_config import ModelConfig, RopeScaling, UnsupportedCheckpoint
from tests.engine.test_storage import Tensors, parameters, rewritten
from tests.support.families import write_tiny
from tests.support.family_models import MODELS

GEMMA3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}
MISTRAL_SMALL: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "text_config": {
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1024, "model_type": "pixtral"},
}
QWEN2_5_VL_7B: dict[str, Any] = {  # as it was first published: the text model's fields beside the others
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {"depth": 32, "hidden_size": 1280, "model_type": "qwen2_5_vl"},
    "vocab_size": 152064,
}
QWEN3_VL_8B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "hidden_size": 1152},
}


def sizes(config: ModelConfig) -> tuple[int, ...]:
    return (
        config.vocab_size,
        config.hidden_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )


def test_gemma_3_says_of_its_text_model_what_differs_from_the_default() -> None:
    config = model_config(GEMMA3_4B)
    assert sizes(config) == (262208, 2560, 34, 8, 4, 256)
    assert (config.tied_embeddings, config.eos_token_ids, config.dtype) == (True, (1, 106), "bfloat16")
    assert (config.rope_theta, config.windowed_rope_theta) == (1e6, 1e4)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    assert config.windows[:7] == (1024,) * 5 + (None, 1024)


def test_mistral_small() -> None:
    config = model_config(MISTRAL_SMALL)
    assert sizes(config) == (131072, 5120, 40, 32, 8, 128)
    assert (config.tied_embeddings, config.windows, config.rope_theta) == (False, (), 1e9)


def test_ministral_3_ends_where_its_queries_would_be_scaled() -> None:
    """A short config.json is filled in as transformers does."""
    text = {**MISTRAL_SMALL["text_config"], "model_type": "ministral3", "max_position_embeddings": 262144}
    for name in ("sliding_window", "rope_theta"):
        del text[name]
    config = model_config({**MISTRAL_SMALL, "text_config": text})
    assert (config.max_position, config.rope_theta, config.windows) == (16384, 1e6, ())
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=16.0, original_max_position=16384)
    alone = {**text, "architectures": ["Ministral3ForCausalLM"], "dtype": "bfloat16"}
    assert model_config(alone).max_position == 16384
    rope = {"rope_type": "default", "rope_theta": 1e6}
    assert model_config({**alone, "rope_parameters": rope}).max_position == 262144


def test_qwen_turns_text_by_one_position() -> None:
    config = model_config(QWEN2_5_VL_7B)
    assert sizes(config) == (152064, 3584, 28, 28, 4, 128)
    assert (config.rope_theta, config.rope_scaling, config.windows) == (1e6, None, ())
    assert (config.qkv_bias, config.out_bias) == (True, False)
    config = model_config(QWEN3_VL_8B)
    assert sizes(config) == (151936, 4096, 36, 32, 8, 128)
    assert (config.rope_theta, config.rope_scaling, config.qk_norm) == (5e6, None, "head")
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [
        ({}, {}, False),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True),  # as transformers 5 writes it
        ({}, {"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, True),  # as 4 did
        ({"tie_word_embeddings": False}, {}, False),
    ],
    ids=str,
)
def test_which_of_both_says_that_the_head_is_tied(
    outer: dict[str, Any], inner: dict[str, Any], tied: bool
) -> None:
    text = {**MISTRAL_SMALL["text_config"], **inner}
    assert model_config({**MISTRAL_SMALL, **outer, "text_config": text}).tied_embeddings is tied


@pytest.mark.parametrize(
    ("published", "fields", "named"),
    [
        (
            MISTRAL_SMALL,
            {"text_config": {"model_type": "mistral4"}},
            "'mistral4'.*allowed: mistral, ministral3",
        ),
        (MISTRAL_SMALL, {"text_config": None}, "lacks text_config"),
        (MISTRAL_SMALL, {"text_config": "mistral"}, "text_config must be an object"),
        (MISTRAL_SMALL, {"text_config": {"model_type": "mistral"}}, "lacks num_attention_heads"),
        (GEMMA3_4B, {"text_config": {"hidden_size": "many"}}, "hidden_size must be a number"),
        (MISTRAL_SMALL, {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        (GEMMA3_4B, {"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention"),
        (QWEN2_5_VL_7B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(
    published: dict[str, Any], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=named):
        model_config({**published, **fields})


@pytest.mark.parametrize(
    "architecture", ["Mistral3ForConditionalGeneration", "Qwen3VLForConditionalGeneration"]
)
def test_both_ways_to_name_tensors_are_read_and_nothing_else_is(tmp_path: Path, architecture: str) -> None:
    write_tiny(tmp_path, architecture, MODELS[architecture][0])
    before = parameters(tmp_path)

    def renamed(tensors: Tensors) -> Tensors:
        """As the other version of transformers writes it."""
        old = any(name.startswith("language_model.") for name in tensors)
        steps = (
            (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
            if old
            else (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
        )
        made = {}
        for name, tensor in tensors.items():
            for start, other in steps:
                if name.startswith(start):
                    name = other + name.removeprefix(start)
                    break
            made[name] = tensor
        return made

    after = parameters(rewritten(tmp_path, renamed))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("vision" in name or "visual" in name for name in after)
    with pytest.raises(UnsupportedCheckpoint, match=r"audio_tower\.weight is not known"):
        parameters(rewritten(tmp_path, lambda found: {**found, "audio_tower.weight": torch.ones(2)}))
