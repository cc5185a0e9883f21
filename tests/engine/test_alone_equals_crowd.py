"""A request's tokens depend on itself: alone or in any crowd, in any order, preempted or not, they are the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Completion, Request, RequestId, SamplingParams
from tests.support.tiny import VOCAB_SIZE, write_tiny_llama

PAGE_SIZE = 16
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "n": 2},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8, "stop": ("e", "1")},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_tokens": 4, "stop_token_ids": (7, 8, 9)},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(11)
    return [
        Request(
            id=RequestId(str(number), 1),
            prompt_token_ids=tuple(
                rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice([1, 5, 17, 40, 90]))
            ),
            sampling=SamplingParams(
                seed=rng.randrange(2**63), max_tokens=rng.randrange(4, 40), **KINDS[number % len(KINDS)]
            ),
        )
        for number in range(50)
    ]


def load(folder: Path, num_pages: int, **settings: Any) -> Engine:
    page_bytes = Checkpoint.open(str(folder)).config.kv_bytes_per_token(4) * PAGE_SIZE
    memory = num_pages * page_bytes
    return Engine.load(
        EngineConfig(model=str(folder), dtype="float32", kv_cache_memory_bytes=memory, threads=1, **settings)
    )


def run(engine: Engine, requests: Sequence[Request]) -> dict[RequestId, Completion]:
    for request in requests:
        engine.add(request)
    done: dict[RequestId, Completion] = {}
    while engine.has_work:
        done |= {completion.id: completion for completion in engine.step()}
    return done


@pytest.fixture(scope="module")
def alone(folder: Path, requests: list[Request]) -> dict[RequestId, Completion]:
    engine = load(folder, 64)
    assert engine.runner.deterministic
    return {request.id: run(engine, [request])[request.id] for request in requests}


def test_the_requests_are_worth_comparing(alone: dict[RequestId, Completion]) -> None:
    """Endings of all kinds, and samples that differ from each other."""
    outputs = [output for completion in alone.values() for output in completion.outputs]
    assert len(outputs) == 60
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert {type(output.stop_reason) for output in outputs} == {type(None), str, int}
    assert all(
        c.outputs[0].token_ids != c.outputs[1].token_ids for c in alone.values() if len(c.outputs) == 2
    )


@pytest.mark.parametrize(
    ("num_pages", "settings"),
    [
        (1000, {}),
        (24, {}),  # preemption
        (1000, {"max_num_batched_tokens": 13}),  # chunks
        (40, {"max_num_batched_tokens": 37, "max_num_seqs": 5}),
    ],
)
def test_all_together_give_the_same_completions(
    folder: Path,
    requests: list[Request],
    alone: dict[RequestId, Completion],
    num_pages: int,
    settings: dict[str, Any],
) -> None:
    engine = load(folder, num_pages, **settings)
    shuffled = random.Random(num_pages).sample(requests, len(requests))
    assert run(engine, shuffled) == alone
    assert num_pages != 24 or engine.stats()["num_preemptions"] > 0


def test_bfloat16_is_the_same_too(folder: Path, requests: list[Request]) -> None:
    config = EngineConfig(model=str(folder), dtype="bfloat16", kv_cache_memory_bytes=1 << 22, threads=1)
    engine = Engine.load(config)
    if not engine.runner.deterministic:
        pytest.skip("bfloat16 products on this machine depend on the number of rows")
    together = run(engine, requests)
    for request in requests:
        assert run(engine, [request])[request.id] == together[request.id]
