"""Every family's tokens and logprobs are those of transformers: tiny models, written by transformers itself,
with little memory, in odd chunks, arriving in any order, preempted.

A new family is one row in `MODELS`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.families import FAMILIES
from engine.request import Output, Request, RequestId, SamplingParams
from tests.support.pressure import run_arriving
from tests.support.theirs import continued
from tests.support.tiny import VOCAB_SIZE, write_tokenizer

NUM_PAGES = 11  # the longest alone needs 9
PAGE_SIZE = 16
LENGTHS = (1, 16, 29, 47, 70)
MAX_TOKENS = 64
TOP = 3
MODELS: dict[str, tuple[dict[str, Any], ...]] = {
    "Qwen2ForCausalLM": (
        {},
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 6,
            "hidden_size": 96,
            "vocab_size": 333,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "MistralForCausalLM": (
        {"sliding_window": None, "head_dim": 24},
        {"sliding_window": 512, "num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "Qwen3ForCausalLM": (
        {"head_dim": 16, "attention_bias": True},
        {"head_dim": 40, "num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "Olmo2ForCausalLM": (
        {"num_attention_heads": 6, "hidden_size": 96, "tie_word_embeddings": True},
        {"attention_bias": True, "num_key_value_heads": 4, "head_dim": 24},
    ),
    "SmolLM3ForCausalLM": (
        {"no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True},
        {"no_rope_layer_interval": 2, "num_hidden_layers": 4, "tie_word_embeddings": False},
    ),
    "Phi3ForCausalLM": (
        {"partial_rotary_factor": 0.75, "num_key_value_heads": 1},
        {"partial_rotary_factor": 0.4, "head_dim": 40, "tie_word_embeddings": True, "sliding_window": 600},
        {"num_attention_heads": 2, "hidden_size": 80},
    ),
    "GraniteForCausalLM": (
        {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3, "tie_word_embeddings": True},
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "SeedOssForCausalLM": (
        {"head_dim": 16, "tie_word_embeddings": True},
        {"head_dim": 32, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
}


class Case(NamedTuple):
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: Tensor  # [MAX_TOKENS, vocab]


def write_tiny(folder: Path, architecture: str, changes: dict[str, Any]) -> Any:
    """A random model in transformers' own files, and the model itself."""
    model_class = getattr(transformers, architecture)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    model = model_class(model_class.config_class(**fields | changes)).float().eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            else:  # wide enough that attention is peaked and greedy tokens vary
                parameter.normal_(0.0, 0.3 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def reference_case(model: Any, length: int, rng: random.Random) -> Case:
    prompt = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length))
    whole = continued(model, prompt, MAX_TOKENS)
    with torch.inference_mode():
        logprobs = model(whole).logits[0, length - 1 : -1].log_softmax(dim=-1)
    return Case(prompt, tuple(whole[0, length:].tolist()), logprobs)


@pytest.fixture(
    scope="module", params=[(name, i) for name, models in MODELS.items() for i in range(len(models))], ids=str
)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Case]]:
    architecture, number = request.param
    folder = tmp_path_factory.mktemp("tiny")
    torch.set_num_threads(1)
    model = write_tiny(folder, architecture, MODELS[architecture][number])
    rng = random.Random(7)
    cases = [reference_case(model, length, rng) for length in LENGTHS]
    assert len({token for case in cases for token in case.token_ids}) > 20  # else anything would match
    return folder, cases


@pytest.mark.parametrize("chunk", [7, 64])
def test_tokens_and_logprobs_equal_transformers(reference: tuple[Path, list[Case]], chunk: int) -> None:
    folder, cases = reference
    outputs = generated(folder, [case.prompt for case in cases], chunk)
    for case, output in zip(cases, outputs, strict=True):
        assert output.token_ids == case.token_ids
        assert output.logprobs is not None
        for one, expected in zip(output.logprobs, case.logprobs, strict=True):
            assert one.logprob == pytest.approx(expected[one.token_id].item(), abs=1e-4)
            likeliest = expected.topk(TOP).values.tolist()
            assert [value for _, value in one.top] == pytest.approx(likeliest, abs=1e-4)
            assert [expected[token].item() for token, _ in one.top] == pytest.approx(likeliest, abs=1e-4)


def generated(folder: Path, prompts: list[tuple[int, ...]], chunk: int) -> list[Output]:
    """Our greedy answers, from an engine that has too little memory for all of them."""
    page_bytes = Checkpoint.open(str(folder)).config.kv_bytes_per_token(4) * PAGE_SIZE
    engine = Engine.load(
        EngineConfig(
            model=str(folder),
            dtype="float32",
            device="cpu",
            page_size=PAGE_SIZE,
            threads=1,
            kv_cache_memory_bytes=NUM_PAGES * page_bytes,
            max_num_batched_tokens=chunk,
        )
    )
    assert engine.pool.num_pages == NUM_PAGES
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, seed=1, logprobs=TOP)
    requests = [
        Request(id=RequestId(str(number), 1), prompt_token_ids=prompt, sampling=sampling)
        for number, prompt in enumerate(prompts)
    ]
    done = run_arriving(engine, requests, seed=chunk)
    assert engine.stats()["num_preemptions"] > 3
    return [done[request.id].outputs[0] for request in requests]


def test_every_family_is_compared() -> None:
    assert {"LlamaForCausalLM", *MODELS} == set(FAMILIES)  # Llama itself in test_parity.py
