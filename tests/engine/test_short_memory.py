"""A device whose memory comes and goes: pages are moved all the same, and graphs are captured once there is room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.cache import KVCache
from engine.decode_inputs import Shape
from engine.decode_steps import DRAWS, DecodeSteps, Graphs
from engine.plan import Launched, Plan
from engine.runner import ModelRunner
from tests.engine.test_alone_equals_crowd import comparable, load, make_requests
from tests.engine.test_flight import requests
from tests.engine.test_shared_steps import CONTEXTS, OTHERS, PAGE, plan, prepared
from tests.support.pressure import run
from tests.support.tiny import write_tiny_llama

PATIENCE = 8  # instead of 256 launches


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model", num_layers=1, max_position=1024)


def test_pages_are_moved_though_memory_runs_out_now_and_then(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make_requests(40)
    calls, outer = count(1), KVCache._index

    def narrow(cache: KVCache, pages: Sequence[int]) -> Tensor:
        if len(pages) > 2 or next(calls) % 20 == 0:
            raise torch.OutOfMemoryError("none is left")
        return outer(cache, pages)

    found = []
    for index in (outer, narrow):
        engine = load(model, 24, threads=1, preemption_mode="swap", num_host_pages=100)
        monkeypatch.setattr(KVCache, "_index", index)
        found.append(comparable(run(engine, asked, preempting=True, poison=False)))
        assert engine.stats()["num_swapped_in_pages"] > 0
    assert next(calls) > 60
    assert found[0] == found[1]


class Replay:
    """As a graph: what it does, it does again."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


class Capturing(DecodeSteps):
    """As on a GPU, whose memory for graphs comes and goes."""

    has_memory = False
    num_tries = 0
    num_replays = 0

    def _captured(self, shape: Shape) -> Graphs:
        self.num_tries += 1
        if not self.has_memory:
            raise RuntimeError("CUDA error: out of memory\nmore words")
        made: list[Tensor] = []

        def forward() -> None:
            self.num_replays += 1
            made[:] = [self._compute(shape)]

        draws = {draw: Replay(lambda draw=draw: self._advance(shape, made[0], draw)) for draw in DRAWS}
        return Graphs(*cast(Any, (Replay(forward), draws, Replay(lambda: None))))


def test_a_shape_that_found_no_memory_is_captured_later(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.shortage.PATIENCE", PATIENCE)
    decoder, cache = prepared(model, "reference")
    steps = Capturing(
        decoder, cache, page_size=PAGE, most_rows=8, most_pages=64, most_steps=4, row_multiple=1
    )
    steps._captures = True
    rows = plan(CONTEXTS | OTHERS)

    def launch() -> list[list[int]]:
        with torch.inference_mode():
            return steps.launch(rows, 3).tokens()

    without = launch()
    tried_at = [0]
    for number in range(1, 8 * PATIENCE):
        before = steps.num_tries
        assert launch() == without
        tried_at += [number] * (steps.num_tries - before)
    assert tried_at == [0, PATIENCE, 3 * PATIENCE, 7 * PATIENCE]
    steps.has_memory = True
    for _ in range(16 * PATIENCE):
        assert launch() == without
    assert steps.num_tries == 5
    assert 0 < steps.num_replays < 3 * 16 * PATIENCE


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
    ],
)
def test_what_is_no_shortage_still_ends_the_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, is_one: bool
) -> None:
    (one,) = requests(1, 40)
    engine = load(model, 24, threads=1)
    wanted = run(engine, [one], poison=False)[one.id].outputs
    outer, calls = ModelRunner._launched, count()

    def short(runner: ModelRunner, plan: Plan) -> Launched:
        if next(calls) == 0:
            raise error
        return outer(runner, plan)

    monkeypatch.setattr(ModelRunner, "_launched", short)
    engine = load(model, 24, threads=1)
    if is_one:
        assert run(engine, [one], poison=False)[one.id].outputs == wanted
    else:
        engine.add(one)
        with pytest.raises(RuntimeError, match="CUDA error"):
            engine.step()
