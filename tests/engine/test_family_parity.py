"""Every family's tokens and logprobs, of prompts too, are those of transformers: tiny models, written by transformers
itself, with little memory, in odd chunks, arriving in any order, preempted.

A new family is one row in `MODELS` of `tests/support/family_models.py`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.families import FAMILIES
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from tests.support.families import Peer, assert_equal, generated, peer_of, write_tiny
from tests.support.family_models import MODELS
from tests.support.tiny import VOCAB_SIZE


def params() -> list[Any]:
    """In `make test` the first model of each family."""
    return [
        pytest.param((name, i), marks=pytest.mark.long if i else ())
        for name, models in MODELS.items()
        for i in range(len(models))
    ]


@pytest.fixture(scope="module", params=params(), ids=str)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Peer]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, peer_of(folder, *request.param)


@pytest.mark.parametrize("chunk", [7, pytest.param(64, marks=pytest.mark.long)])
def test_tokens_and_logprobs_equal_transformers(reference: tuple[Path, Peer], chunk: int) -> None:
    folder, peer = reference
    assert_equal(peer, generated(folder, peer.prompts, chunk))


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_gemma_in_bf16_stays_as_near_to_transformers_as_bf16_is_to_fp32(
    architecture: str, tmp_path: Path
) -> None:
    """hidden_size 96: its root is rounded before it multiplies. The first token's five likeliest."""
    changes = MODELS[architecture][0] | {"hidden_size": 96, "final_logit_softcapping": 6.0}
    theirs = write_tiny(tmp_path, architecture, changes)
    engine = Engine.load(EngineConfig(model=str(tmp_path), dtype="bfloat16", device="cpu", threads=1))
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, seed=1, logprobs=5)
    rng, ours, away = random.Random(3), [], []
    prompts = [tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in (5, 40, 70)]
    with torch.inference_mode():
        exact = [theirs(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
        theirs.bfloat16()
        rounded = [theirs(torch.tensor([p])).logits[0, -1].float().log_softmax(-1) for p in prompts]
    for number, prompt in enumerate(prompts):
        engine.add(Request(id=RequestId(str(number), 1), prompt_token_ids=prompt, sampling=sampling))
    done = {}
    while engine.has_work:
        done |= {completion.id: completion for completion in engine.step()}
    for number, (right, near) in enumerate(zip(exact, rounded, strict=True)):
        logprobs = done[RequestId(str(number), 1)].outputs[0].logprobs
        assert logprobs is not None
        for token, value in logprobs[0].top:
            ours.append(abs(value - near[token].item()))
            away.append(abs(right[token].item() - near[token].item()))
    assert sum(ours) < 1.5 * sum(away)
    assert max(ours) < 0.25


def test_every_family_is_compared() -> None:
    assert set(MODELS) == set(FAMILIES)
