"""What transformers computes for us, in packed and chunked steps over our pages, is what it computes alone: tokens
and logprobs of tiny models, with little memory, arriving in any order, preempted.

A new architecture is one row in `MODELS`. `test_fallback.py` has what is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.checkpoint import Checkpoint
from engine.families import FAMILIES
from tests.support.families import LENGTHS, Peer, assert_equal, generated, prompts_of
from tests.support.tiny import SIZES, write_tokenizer

UNSCALED = {"rope_type": "default", "rope_theta": 10000.0}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": None, "intermediate_size": None}
MODELS: dict[str, tuple[dict[str, Any], ...]] = {
    "Starcoder2ForCausalLM": (
        {"sliding_window": None, "tie_word_embeddings": False},
        {"sliding_window": 40, "num_key_value_heads": 1, "use_bias": False, "hidden_act": "gelu"},
    ),
    "StableLmForCausalLM": (
        {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
        {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "CohereForCausalLM": (
        {"logit_scale": 0.25},
        {"use_qk_norm": True, "attention_bias": True, "num_key_value_heads": 4},
    ),
    "Cohere2ForCausalLM": ({"sliding_window": 24, "num_hidden_layers": 4},),
    "OPTForCausalLM": (
        OPT,
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 48, "activation_function": "gelu"},
    ),
    "NemotronForCausalLM": ({"head_dim": 16, "partial_rotary_factor": 0.5},),
    "PhiForCausalLM": ({"partial_rotary_factor": 0.5, "num_key_value_heads": 4},),
    "OlmoForCausalLM": ({"clip_qkv": 2.0},),
    "GPTBigCodeForCausalLM": ({"num_key_value_heads": None, "intermediate_size": None, "n_inner": 96},),
    "Gemma2ForCausalLM": (
        {"sliding_window": 20, "attn_logit_softcapping": 3.0, "head_dim": 16, "tie_word_embeddings": False},
    ),
    "GraniteSWAForCausalLM": ({"sliding_window": 24, "tie_word_embeddings": False},),
    "OlmoeForCausalLM": ({"num_experts": 8, "num_experts_per_tok": 3},),
    # of our own families: the fallback against two references at once
    "GptOssForCausalLM": (
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "head_dim": 16,
            "rope_parameters": UNSCALED,
        },
    ),
    "LlamaForCausalLM": ({"attention_bias": True},),
}

QUICK = (
    "Starcoder2ForCausalLM",
    "StableLmForCausalLM",
    "CohereForCausalLM",
    "OPTForCausalLM",
    "LlamaForCausalLM",
)
SPARED = ("sliding_window", "bos_token_id", "eos_token_id")  # fields whose None says something


def write_foreign(folder: Path, architecture: str, changes: dict[str, Any]) -> Any:
    """A random model in transformers' own files, and the model itself. None: the architecture has no such field."""
    model_class = getattr(transformers, architecture)
    fields = {
        name: value for name, value in {**SIZES, **changes}.items() if value is not None or name in SPARED
    }
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**fields)).float().eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # small: what is the same for every token hides what is not
                parameter.normal_(0.0, 0.1)
            elif name.endswith("sinks"):  # some heads attend to hardly anything else, some never to them
                parameter.normal_(2.0, 3.0)
            elif parameter.ndim == 1 or "norm" in name:
                parameter.normal_(1.0, 0.2)
            else:  # wide enough that attention is peaked and greedy tokens vary
                parameter.normal_(0.0, 0.3 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def params() -> list[Any]:
    """In `make test` one model of each architecture in `QUICK`."""
    return [
        pytest.param((name, i), marks=() if name in QUICK and i == 0 else pytest.mark.long)
        for name, models in MODELS.items()
        for i in range(len(models))
    ]


@pytest.fixture(scope="module", params=params(), ids=str)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Peer]:
    architecture, number = request.param
    folder = tmp_path_factory.mktemp("tiny")
    torch.set_num_threads(1)
    model = write_foreign(folder, architecture, MODELS[architecture][number])
    return folder, Peer(model, prompts_of(LENGTHS))


@pytest.mark.parametrize("chunk", [7, pytest.param(64, marks=pytest.mark.long)])
def test_tokens_and_logprobs_equal_transformers(reference: tuple[Path, Peer], chunk: int) -> None:
    folder, peer = reference
    assert_equal(peer, generated(folder, peer.prompts, chunk, model_impl="transformers"))


def test_what_has_no_entry_needs_no_setting(reference: tuple[Path, Peer]) -> None:
    config = Checkpoint.open(str(reference[0])).config
    ours = config.architecture in FAMILIES
    assert config.definition == ("nightpress" if ours else "transformers")
