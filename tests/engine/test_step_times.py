"""Where the time of a step goes: each second of a whole step in one part, and none of one that came to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.llm import LLM
from engine.sampling_params import SamplingParams
from engine.step_times import PARTS, StepTimes
from tests.support.tiny import write_tiny_llama


class Hands:
    """A clock that somebody turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_part_lasts_until_the_next_begins() -> None:
    hands = Hands()
    times = StepTimes(hands)
    times.start()
    for part, seconds in (("inputs", 1), ("forward", 2), ("plan", 4), ("answer", 8)):
        hands.now += seconds
        times.begin(part)  # type: ignore[arg-type]
    hands.now += 16
    assert times.stop() == 31
    hands.now += 1000  # nothing is computed
    times.start()
    hands.now += 32
    assert times.stop() == 32
    assert times.counters() == {
        "plan_seconds": 1 + 8 + 32,
        "inputs_seconds": 2,
        "forward_seconds": 4,
        "sample_seconds": 0,
        "wait_seconds": 0,
        "answer_seconds": 16,
    }


def test_a_step_that_came_to_nothing_does_not_count() -> None:
    hands = Hands()
    times = StepTimes(hands)
    times.start()
    hands.now += 1
    times.begin("forward")
    hands.now += 1  # and an error ends it
    times.start()
    hands.now += 5
    times.begin("answer")
    assert times.stop() == 5
    assert sum(times.counters().values()) == 5


def test_the_parts_are_the_busy_seconds(tmp_path: Path) -> None:
    llm = LLM(
        model=str(write_tiny_llama(tmp_path)),
        device="cpu",
        threads=1,
        kv_cache_memory_bytes=1 << 22,
        use_tqdm=False,
    )
    before = llm.engine.stats()
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [5, 6, 7]}] * 2, sampling, use_tqdm=False)
    after = llm.engine.stats()
    spent = {part: after[f"{part}_seconds"] - before[f"{part}_seconds"] for part in PARTS}
    assert sum(spent.values()) == pytest.approx(after["busy_seconds"] - before["busy_seconds"])
    assert all(spent.values()), spent
