"""Every family that GGUF files may hold: the logits of a tiny model that llama.cpp's rules were applied to are those
that transformers computes from the original.

A new family is one row in `MODELS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGUFWriter

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.config import EngineConfig
from engine.gguf_families import GGUF_FAMILIES
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from tests.support.rollout import page_order, plan_for, sequence
from tests.support.tiny import SIZES
from tests.support.tiny_gguf import Change, write_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("llama", "Mistral", {"sliding_window": None, "head_dim": 24}),
    ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    ("qwen2", "Qwen2", {"rope_parameters": YARN}),
    ("qwen3", "Qwen3", {"head_dim": 40}),
    ("phi3", "Phi3", {"num_key_value_heads": 1}),
    ("phi3", "Phi3", {"partial_rotary_factor": 0.75, "rope_parameters": None}),
    ("olmo2", "Olmo2", {}),
    ("granite", "Granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
     | {"attention_multiplier": 0.3, "attention_bias": True, "tie_word_embeddings": True}),
    ("smollm3", "SmolLM3", {"num_hidden_layers": 5}),
    ("seed_oss", "SeedOss", {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}),
]  # fmt: skip


def tiny(family: str, changes: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize(("architecture", "family", "changes"), MODELS, ids=str)
def test_logits_are_those_of_the_original(
    tmp_path: Path, architecture: str, family: str, changes: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    model = tiny(family, changes)
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture)
    runner = ModelRunner.load(
        EngineConfig(model=str(path), dtype="float32", max_num_seqs=2, kv_cache_memory_bytes=2**24),
        Checkpoint.open(str(path)),
    )
    for prompt in (range(3, 90), range(300, 200, -7)):
        item = sequence(prompt, SamplingParams(temperature=0.0, seed=0))
        logits = runner.logits(plan_for(runner, [item], page_order(runner), 100))
        with torch.inference_mode():
            expected = model(torch.tensor([list(prompt)])).logits[0, -1]
        assert expected.std() > 0.05  # else anything would match
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def test_yarn_without_an_original_length_means_the_context_length_in_every_family(tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.add_string("phi3.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(4.0)

    path = write_gguf(tmp_path / "tiny.gguf", tiny("Phi3", {}), "phi3", change=change)
    scaling = Checkpoint.open(str(path)).config.rope_scaling
    assert scaling is not None
    assert scaling.original_max_position == 512  # not the 4096 of Phi-3's config.json


def test_what_ends_a_sample_to_llama_cpp_ends_it(tmp_path: Path) -> None:
    """By its key or by its spelling, but never a piece of text."""
    spelled = {
        "<|im_end|>": 3,
        "</s>": 1,
        "<|end|>": 1,
        "<end_of_turn>": 4,
        "<|im_start|>": 3,
        "<|eot_id|>": 3,
    }

    def change(writer: GGUFWriter) -> None:
        writer.add_token_list(["a", *spelled, "x", "y"])
        writer.add_token_types([1, *spelled.values(), 3, 3])
        writer.add_eos_token_id(8)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 7)

    path = write_gguf(tmp_path / "tiny.gguf", tiny("Llama", {}), "llama", change=change)
    assert Checkpoint.open(str(path)).config.eos_token_ids == (8, 7, 1, 4, 6)


def test_every_family_is_compared() -> None:
    assert {architecture for architecture, _, _ in MODELS} == set(GGUF_FAMILIES)


@pytest.mark.parametrize(
    ("architecture", "family", "change", "says"),
    [
        ("llama", "Llama", lambda w: w.add_expert_count(8), "llama.expert_count"),
        ("llama", "Llama", lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "scaling.factor is missing"),
        ("llama", "Llama", lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "'longrope'"),
        ("llama", "Llama", lambda w: w.add_logit_scale(2.0), "llama.logit_scale"),
        ("llama", "Llama", lambda w: w.add_value_length(8), "attention.value_length must be 16"),
        ("olmo2", "Olmo2", lambda w: w.add_sliding_window(64), r"sliding_window \(64\) is not supported"),
        ("qwen2", "Qwen2", lambda w: w.add_uint32("qwen2.attention.key_length", 24), "partial_rotary_factor"),
        ("qwen2", "Qwen2", lambda w: w.add_array("qwen2.attention.key_length", [1, 2]), "wrong kind"),
    ],
)  # fmt: skip
def test_what_the_decoder_would_compute_wrongly_is_refused_by_its_key(
    tmp_path: Path, architecture: str, family: str, change: Change, says: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny(family, {}), architecture, change=change)
    with pytest.raises(UnsupportedCheckpoint, match=says):
        Checkpoint.open(str(path))
