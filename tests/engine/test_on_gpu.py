"""The engine on a GPU: the answers of transformers, the same bits in any crowd, and a long random history.

It needs no service and no database: `python -m pytest tests/engine/test_on_gpu.py --confcutdir tests/engine` runs it
where only torch, triton and transformers are. Where there is no GPU the same tests run on the kernels of the CPU, so
that they are known to work. NIGHTPRESS_SOAK_SECONDS: how long the random history is.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.decode_steps import DecodeSteps
from engine.engine import Engine
from engine.memory import bytes_per_page
from engine.request import Completion, Request, RequestId
from engine.sampling_params import SamplingParams
from tests.engine.test_alone_equals_crowd import Answers, comparable, make_requests
from tests.support.families import assert_near, generated, reference_cases, write_tiny
from tests.support.family_models import MODELS
from tests.support.pressure import expect_short_answers, run
from tests.support.tiny import VOCAB_SIZE, write_tiny_llama

PAGE_SIZE = 16
SOAK_SECONDS = float(os.environ.get("NIGHTPRESS_SOAK_SECONDS", "20" if torch.cuda.is_available() else "3"))
LEAST_ADDED = 60  # of the random history, however slow the machine is
KERNELS = {"cuda": "triton", "cpu": "auto"}
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "prompt_logprobs": 0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.01},
    {"temperature": 1.3, "top_p": 0.8, "n": 2, "frequency_penalty": 1.5},
)


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("cpu", marks=pytest.mark.long),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    if torch.cuda.is_available() != (request.param == "cuda"):
        pytest.skip("needs a GPU" if request.param == "cuda" else "there is a GPU")
    return request.param


def load(folder: Path, device: str, num_pages: int, **settings: Any) -> Engine:
    """In bf16, with exactly so many pages."""
    page_bytes = bytes_per_page(Checkpoint.open(str(folder)).config, PAGE_SIZE, torch.bfloat16)
    engine = Engine.load(
        EngineConfig(
            model=str(folder),
            device=device,
            dtype="bfloat16",
            kernels=KERNELS[device],  # type: ignore[arg-type]
            threads=1,
            page_size=PAGE_SIZE,
            kv_cache_memory_bytes=num_pages * page_bytes,
            **settings,
        )
    )
    assert engine.pool.num_pages == num_pages
    return engine


def write_model(folder: Path, *, experts: bool = False) -> Path:
    """Large enough that products are made of whole tiles, and some of them in segments."""
    if experts:
        changes = MODELS["Qwen3MoeForCausalLM"][0]
        write_tiny(
            folder, "Qwen3MoeForCausalLM", {**changes, "hidden_size": 256, "moe_intermediate_size": 64}
        )
        return folder
    return write_tiny_llama(folder, seed=5, hidden_size=256, intermediate_size=1024, attention_bias=True)


@pytest.mark.parametrize("architecture", MODELS)
def test_every_family_answers_as_transformers_does(architecture: str, device: str, tmp_path: Path) -> None:
    cases = reference_cases(tmp_path, architecture, 0)
    prompts = [case.prompt for case in cases]
    found = generated(tmp_path, prompts, 64, device=device, kernels=KERNELS[device])
    assert_near(cases, found, 1e-3)


def test_the_reference_kernels_answer_there_too(device: str, tmp_path: Path) -> None:
    cases = reference_cases(tmp_path, "LlamaForCausalLM", 0)
    found = generated(tmp_path, [case.prompt for case in cases], 64, device=device, kernels="reference")
    assert_near(cases, found, 1e-3)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Without grammars, which are made by a library that not every machine has."""
    return [one for one in make_requests(77) if one.sampling.structured_outputs is None][:64]


@pytest.mark.parametrize("experts", [False, True])
def test_alone_in_crowds_and_preempted_the_bits_are_the_same(
    device: str, tmp_path: Path, requests: list[Request], experts: bool
) -> None:
    if experts and device == "cpu":
        pytest.skip("test_family_crowd says it there")
    assert len(requests) == 64
    folder = write_model(tmp_path, experts=experts)
    single = load(folder, device, 64, deterministic=True, enable_prefix_caching=False)
    assert single.runner.deterministic
    alone: Answers = {}
    for request in requests:
        alone |= comparable(run(single, [request], poison=False))
    roomy = load(folder, device, 1000, deterministic=True)
    for size in (2, 5, 17, 64):
        crowd = random.Random(size).sample(requests, size)
        expected = {request.id: alone[request.id] for request in crowd}
        assert comparable(run(roomy, crowd, poison=False)) == expected, size
    tight = load(folder, device, 24, deterministic=True, max_num_batched_tokens=50)
    assert comparable(run(tight, requests, preempting=True)) == alone
    assert tight.stats()["num_preemptions"] > 0


FREE: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "top_p": 0.95, "top_k": 20},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.02, "n": 2},
    {"temperature": 0.8, "top_k": 500, "top_p": 0.999},
    {"temperature": 1.0},
    {"temperature": 0.0, "top_k": 4},
    {"temperature": 0.7, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
)


def test_filtered_and_penalised_rows_draw_the_same_in_several_steps(device: str, tmp_path: Path) -> None:
    """Whose draws are replayed from graphs, where there is a GPU."""
    folder = write_model(tmp_path)
    requests = [
        Request(
            id=RequestId(f"job-{number}", 1),
            prompt_token_ids=tuple(range(3, 20 + number)),
            sampling=SamplingParams(
                seed=number, max_tokens=40 + number % 5, ignore_eos=True, **FREE[number % len(FREE)]
            ),
        )
        for number in range(24)
    ]
    answers: list[Answers] = []
    plans = []
    for steps in (1, 8):
        engine = load(folder, device, 400, deterministic=True, num_scheduler_steps=steps)
        answers.append(comparable(run(engine, requests, poison=False)))
        plans.append(engine.stats()["num_steps"])
    assert answers[0] == answers[1]
    assert plans[1] < plans[0] / 3


def test_steps_without_memory_for_their_graphs_are_the_same(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: of every other shape the capture fails, half-way. A CPU captures nothing."""
    folder, outer = write_model(tmp_path), DecodeSteps._capture
    asked = [
        Request(
            id=RequestId(str(number), 1),
            prompt_token_ids=tuple(range(3, 20 + number)),
            sampling=SamplingParams(
                seed=number, max_tokens=100, ignore_eos=True, logprobs=number % 3 or None
            ),
        )
        for number in range(24)
    ]
    whole = comparable(run(load(folder, device, 400), asked, poison=False))
    captures = count()

    @contextmanager
    def narrow(steps: DecodeSteps) -> Iterator[Any]:
        with outer(steps) as graph:
            yield graph
            if next(captures) % 12 == 7:  # of the ten graphs of a shape
                raise torch.OutOfMemoryError("none is left")

    monkeypatch.setattr(DecodeSteps, "_capture", narrow)
    engine = load(folder, device, 400)
    assert comparable(run(engine, asked, poison=False)) == whole
    assert (next(captures) > 0) == (device == "cuda")


@pytest.mark.timeout(SOAK_SECONDS + 300)
def test_a_long_random_history_loses_no_page(device: str, tmp_path: Path) -> None:
    engine = load(write_model(tmp_path), device, 60, max_num_seqs=24, max_num_batched_tokens=96)
    done, aborted = soaked(engine, SOAK_SECONDS, random.Random(9))
    assert done > 20
    assert aborted > 0
    stats = engine.stats()
    assert stats["num_preemptions"] > 0
    assert stats["num_cached_tokens"] > 0
    assert engine.pool.num_available == engine.pool.num_pages


def soaked(engine: Engine, seconds: float, rng: random.Random) -> tuple[int, int]:
    """Adds, aborts and preempts for so long, and until enough were added; then lets all that is left end: how many
    were answered, and aborted."""
    templates = [tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in (16, 37, 64, 90)]
    live: dict[RequestId, Request] = {}
    added = done = aborted = 0
    end = time.monotonic() + seconds
    adding = True
    while adding or engine.has_work:
        adding = time.monotonic() < end or added < LEAST_ADDED
        for _ in range(rng.randrange(4) if adding and len(live) < 60 else 0):
            request = random_request(f"job-{added}", templates, rng)
            engine.add(request)
            live[request.id] = request
            added += 1
        if live and rng.random() < 0.05:
            request_id = rng.choice(list(live))
            completion = engine.abort(request_id)
            assert completion is not None
            assert completion.aborted
            del live[request_id]
            aborted += 1
        if rng.random() < 0.5:
            expect_short_answers(engine.scheduler)
        if engine.scheduler.running and rng.random() < 0.05:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        for completion in engine.step():
            answered(live.pop(completion.id), completion)
            done += 1
        engine.check()
    assert not live
    return done, aborted


def random_request(name: str, templates: list[tuple[int, ...]], rng: random.Random) -> Request:
    own = tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice([1, 5, 17, 40])))
    return Request(
        id=RequestId(name, 1),
        prompt_token_ids=(rng.choice(templates) if rng.random() < 0.6 else ()) + own,
        sampling=SamplingParams(
            seed=rng.randrange(2**63), max_tokens=rng.randrange(1, 60), ignore_eos=True, **rng.choice(KINDS)
        ),
        priority=rng.choice([0, 0, 0, -1, 1]),
        cache_salt=rng.choice(["", "", "other"]),
    )


def answered(request: Request, completion: Completion) -> None:
    assert completion.error is None
    assert len(completion.outputs) == request.sampling.n
    for output in completion.outputs:
        assert len(output.token_ids) == request.sampling.max_tokens
        assert all(0 <= token < VOCAB_SIZE for token in output.token_ids)
