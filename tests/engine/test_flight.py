"""Plans on their way through a device: launched ahead, for sequences that go meanwhile, and too large for it."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from engine import flight
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Launched, OutOfDeviceMemory, Plan
from engine.request import Completion, Request, RequestId
from engine.sampling_params import SamplingParams
from tests.support.checked import CheckedRunner, checked_engine, expected
from tests.support.pressure import run


class Narrow(CheckedRunner):
    """A device that has memory for `most` tokens of a step."""

    most = 0
    num_short = 0

    def launch(self, plan: Plan) -> Launched:
        if plan.num_tokens > self.most:
            self.num_short += 1
            self._move(plan.moves)
            raise OutOfDeviceMemory(f"{plan.num_tokens} tokens")
        return super().launch(plan)


def narrow_engine(most: int, steps: int = 1) -> Engine:
    runner = Narrow(800, 4, 50, num_scheduler_steps=steps)
    runner.most = most
    return Engine(runner, None, EngineConfig(model="checked", max_num_batched_tokens=2000))


def requests(count: int, length: int, max_tokens: int = 20) -> list[Request]:
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=max_tokens, ignore_eos=True)
    return [
        Request(
            id=RequestId(str(number), 1),
            prompt_token_ids=tuple(range(number, number + length)),
            sampling=sampling,
        )
        for number in range(count)
    ]


def test_a_step_without_memory_is_made_of_half_the_tokens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    engine, asked = narrow_engine(150), requests(12, 70)
    done = run(engine, asked, poison=False)
    for one in asked:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 20)
    assert engine.scheduler.max_num_batched_tokens == 105  # of the 840 that all prompts are
    assert caplog.text.count("tokens for now") == 3


PATIENCE = 8  # instead of a minute's plans


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "PATIENCE", PATIENCE)
    monkeypatch.setattr(flight, "MOST_PATIENCE", 4 * PATIENCE)


def plans_until(engine: Engine, budget: int) -> int:
    """How many plans pass until a step may have so many tokens."""
    for number in range(2 * PATIENCE):
        if engine.scheduler.max_num_batched_tokens == budget:
            return number
        engine.step()
    raise AssertionError(f"still {engine.scheduler.max_num_batched_tokens}")


def test_memory_that_comes_back_is_used_again(impatient: None) -> None:
    """What another process had taken for a minute costs the night no more than a few."""
    engine, asked = narrow_engine(150), requests(12, 70, max_tokens=60)
    for one in asked:
        engine.add(one)
    engine.step()
    assert engine.scheduler.max_num_batched_tokens == 105
    engine.runner.most = 10_000  # the other process has ended
    waits = [plans_until(engine, budget) for budget in (210, 420, 840, 1680, 2000)]
    assert waits == [PATIENCE - 1, *[PATIENCE] * 4]
    done = run(engine, [], poison=False)
    for one in asked:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 60)


def test_memory_that_stays_away_is_asked_for_ever_more_rarely(impatient: None) -> None:
    """Prompts keep coming, so that each try meets the limit. None of them costs a request anything."""
    engine = narrow_engine(150)
    asked: list[Request] = []
    done: dict[RequestId, Completion] = {}
    short_at: list[int] = []
    for step in range(32 * PATIENCE):
        while engine.num_requests < 30:
            (one,) = requests(1, 70, max_tokens=2)
            asked.append(replace(one, id=RequestId(str(len(asked)), 1), cache_salt=str(len(asked))))
            engine.add(asked[-1])
        before = engine.runner.num_short
        done |= {completion.id: completion for completion in engine.step()}
        short_at += [step] * (engine.runner.num_short > before)
    pauses = [later - sooner for sooner, later in pairwise(short_at)]
    assert pauses == [PATIENCE, 2 * PATIENCE, *[4 * PATIENCE] * (len(pauses) - 2)]
    assert len(pauses) > 4
    done |= run(engine, [], poison=False)
    for one in asked:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 2)


def test_a_device_that_has_no_memory_at_all_is_given_up() -> None:
    engine = narrow_engine(15)
    engine.add(requests(1, 100)[0])
    with pytest.raises(OutOfDeviceMemory):
        engine.step()
    assert engine.runner.num_short == 5  # 100, 50, 25, and 16 twice


def test_of_several_steps_it_is_the_rows_that_are_halved() -> None:
    engine, asked = narrow_engine(10_000, steps=8), requests(40, 5, max_tokens=64)
    for one in asked:
        engine.add(one)
    for _ in range(3):
        assert engine.step() == []
    engine.runner.most = 30 * 8
    done = run(engine, [], poison=False)
    assert engine.runner.num_short == 2  # one that was to run ahead, and one of 40 rows
    for one in asked:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 64)


class Pieces(CheckedRunner):
    """A device that finds memory for a plan when it is asked again."""

    asked = 0

    def launch(self, plan: Plan) -> Launched:
        self.asked += 1
        if self.asked % 2:
            self._move(plan.moves)
            raise OutOfDeviceMemory("it lies in pieces")
        return super().launch(plan)


def test_the_smallest_plan_is_tried_twice() -> None:
    engine = Engine(Pieces(40, 4, 50), None, EngineConfig(model="checked"))
    (one,) = requests(1, 10)
    assert run(engine, [one], poison=False)[one.id].outputs[0].token_ids == expected(one, 0, 20)
    assert engine.runner.asked == 2 * engine.stats()["num_steps"]


class NoRoomAhead(CheckedRunner):
    """A device that has no memory for a plan beside another one."""

    asked = 0
    has_room = False

    def launch(self, plan: Plan) -> Launched:
        if plan.behind and not self.has_room:
            self.asked += 1
            self._move(plan.moves)
            raise OutOfDeviceMemory("two plans at once")
        return super().launch(plan)


def test_where_there_is_no_memory_ahead_plans_come_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    runner = NoRoomAhead(400, 4, 50, num_scheduler_steps=8)
    engine = Engine(runner, None, EngineConfig(model="checked", num_scheduler_steps=8))
    asked = requests(8, 10, max_tokens=64)
    done = run(engine, asked, poison=False)
    for one in asked:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 64)
    assert runner.asked == 1
    assert "two plans at once" in caplog.text


def test_plans_are_launched_ahead_again_once_there_is_memory(impatient: None) -> None:
    runner = NoRoomAhead(1600, 4, 50, num_scheduler_steps=8)
    engine = Engine(runner, None, EngineConfig(model="checked", num_scheduler_steps=8))
    asked = requests(2, 10, max_tokens=700)
    for one in asked:
        engine.add(one)
    for _ in range(4 * PATIENCE):
        engine.step()
    assert runner.asked == 3  # with pauses of PATIENCE and twice that
    runner.has_room = True
    for _ in range(4 * PATIENCE):
        engine.step()
    assert engine._flight._ahead is not None
    done = run(engine, [], poison=False)
    assert runner.asked == 3
    for one in asked:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 700)


class Short(NoRoomAhead):
    """A device that has no memory for a plan beside another one, nor for a large one alone."""

    num_short = 0

    def launch(self, plan: Plan) -> Launched:
        if plan.num_tokens > 150 and not plan.behind:
            self.num_short += 1
            self._move(plan.moves)
            raise OutOfDeviceMemory(f"{plan.num_tokens} tokens")
        return super().launch(plan)


def test_of_many_plans_one_of_each_kind_is_in_vain(impatient: None) -> None:
    """Where both keep failing, once the budget has been halved."""
    runner = Short(1600, 4, 50, num_scheduler_steps=8)
    engine = Engine(runner, None, EngineConfig(model="checked", num_scheduler_steps=8))
    asked: list[Request] = []
    done: dict[RequestId, Completion] = {}
    seen: list[tuple[int, int]] = []  # plans in vain after each step
    for _ in range(40 * PATIENCE):
        while engine.num_requests < 12:
            (one,) = requests(1, 70, max_tokens=30)
            asked.append(replace(one, id=RequestId(str(len(asked)), 1), cache_salt=str(len(asked))))
            engine.add(asked[-1])
        done |= {completion.id: completion for completion in engine.step()}
        seen.append((runner.num_short, runner.asked))
    for sooner, later in zip(seen, seen[PATIENCE:], strict=False):
        assert later[0] - sooner[0] <= 1
        assert later[1] - sooner[1] <= 1
    assert min(seen[-1]) - min(seen[0]) > 4
    done |= run(engine, [], poison=False)
    for one in asked:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 30)


def test_who_leaves_while_a_plan_runs_ahead_gets_nothing_of_it() -> None:
    engine = checked_engine(400, max_num_seqs=8, steps=8)
    asked = requests(8, 10, max_tokens=64)
    for one in asked:
        engine.add(one)
    for _ in range(3):  # prompts; eight steps, and eight more that run on
        assert engine.step() == []
    made = {one.id: engine.generated(one.id)[0].token_ids for one in asked}
    assert {len(tokens) for tokens in made.values()} == {17}
    aborted = engine.abort(asked[0].id)
    assert aborted is not None
    assert aborted.generated[0].token_ids == made[asked[0].id]
    engine.scheduler.preempt(engine.scheduler.running[1])
    back = Request(
        id=RequestId("0", 2),
        prompt_token_ids=asked[0].prompt_token_ids,
        sampling=asked[0].sampling,
        generated=aborted.generated,
    )
    done = run(engine, [back], poison=False)
    for one in (*asked[1:], back):
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 64)


def test_nobody_waits_for_a_plan_whose_sequences_are_all_gone() -> None:
    engine = checked_engine(400, max_num_seqs=8, steps=8)
    asked = requests(4, 10, max_tokens=64)
    for one in asked:
        engine.add(one)
    for _ in range(2):
        engine.step()
    for one in asked:
        assert engine.abort(one.id) is not None
    assert not engine.has_work
    (later,) = requests(1, 5)
    assert run(engine, [later], poison=False)[later.id].outputs[0].token_ids == expected(later, 0, 20)


def urgent(name: str, **more: Any) -> Request:
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=5, ignore_eos=True)
    return Request(id=RequestId(name, 1), prompt_token_ids=(7, 8, 9), sampling=sampling, **more)


def full_of_plans(pages: int = 400, max_tokens: int = 200) -> tuple[Engine, list[Request]]:
    """Four places, taken by requests that have several turns, and a plan that was launched ahead."""
    engine = checked_engine(pages, max_num_seqs=4, steps=8)
    asked = [replace(one, turn=5) for one in requests(4, 10, max_tokens=max_tokens)]
    for one in asked:
        engine.add(one)
    for _ in range(3):
        assert engine.step() == []
    return engine, asked


@pytest.mark.parametrize(
    "more", [{"priority": -1}, {"turn": 0, "cache_salt": "other"}], ids=["of higher priority", "overtakes"]
)
def test_no_plan_is_launched_ahead_of_one_for_whom_somebody_makes_way(more: dict[str, Any]) -> None:
    engine, asked = full_of_plans()
    one = urgent("urgent", **more)
    engine.add(one)
    done: dict[RequestId, Completion] = {}
    for _ in range(4):  # the plan ahead; one with its prompt; what it has to say
        done |= {completion.id: completion for completion in engine.step()}
    assert done[one.id].outputs[0].token_ids == expected(one, 0, 5)
    done |= run(engine, [], poison=False)
    for other in asked:
        assert done[other.id].outputs[0].token_ids == expected(other, 0, 200)


@pytest.mark.parametrize("more", [{}, {"turn": 4, "cache_salt": "other"}, {"priority": 1}])
def test_who_has_to_wait_stops_no_plan(more: dict[str, Any]) -> None:
    engine, _ = full_of_plans()
    before = engine.stats()["num_steps"]
    engine.add(urgent("patient", **more))
    for _ in range(4):
        assert engine.step() == []
        assert engine._flight._ahead is not None
    assert engine.stats()["num_steps"] == before + 4
