"""The scheduler alone: budgets, order, preemption, endings, and 2,000 random steps without torch."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from engine.pages import PagePool
from engine.plan import Plan
from engine.request import Output, Request, RequestId, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence

EOS = 2
ROOT = Path(__file__).parents[2]


def sequence(name: str, num_prompt: int, max_tokens: int = 8, **sampling: object) -> Sequence:
    params = SamplingParams(seed=0, max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    start = 1000 * (1 + zlib.crc32(name.encode()) % 1000)  # no two names share a prefix
    prompt = tuple(range(start, start + num_prompt))
    request = Request(id=RequestId(name, 1), prompt_token_ids=prompt, sampling=params)
    return Sequence(request, 0, max_tokens)


def scheduler(num_pages: int = 64, *, budget: int = 64, seqs: int = 8, page_size: int = 4) -> Scheduler:
    return Scheduler(
        PagePool(num_pages, page_size), max_num_seqs=seqs, max_num_batched_tokens=budget, eos_token_ids=[EOS]
    )


def optimistic(s: Scheduler) -> Scheduler:
    """It has seen short answers only, so it admits more than will fit."""
    for _ in range(64):
        s.expectations.lengths.observe([], 1, cut=False)
    return s


def shape(plan: Plan) -> list[tuple[str, int]]:
    return [(row.sequence.request.id.job_id, row.num_tokens) for row in plan.rows]


def settle(s: Scheduler, plan: Plan, token: int = 7) -> list[Sequence]:
    finished = s.settle(plan, [token] * len(plan.sampling_rows))
    s.check()
    return finished


def test_a_long_prompt_is_computed_in_chunks_beside_decoding() -> None:
    s = scheduler(budget=10)
    s.add(sequence("a", 4))
    s.add(sequence("b", 20))
    plan = s.plan()
    assert shape(plan) == [("a", 4), ("b", 6)]
    assert [row.sequence.request.id.job_id for row in plan.sampling_rows] == ["a"]
    settle(s, plan)
    plan = s.plan()
    assert shape(plan) == [("a", 1), ("b", 9)]
    settle(s, plan)
    plan = s.plan()
    assert shape(plan) == [("a", 1), ("b", 5)]
    assert len(plan.sampling_rows) == 2


def test_first_come_first_served_and_no_more_than_max_num_seqs() -> None:
    s = scheduler(seqs=2)
    for name in "abc":
        s.add(sequence(name, 3, max_tokens=2))
    settle(s, plan := s.plan())
    assert shape(plan) == [("a", 3), ("b", 3)]
    assert [one.request.id.job_id for one in settle(s, s.plan())] == ["a", "b"]
    assert shape(s.plan()) == [("c", 3)]


def test_the_least_computed_is_preempted_and_comes_back_first() -> None:
    s = optimistic(scheduler(num_pages=6, page_size=4))
    s.add(sequence("long", 8, max_tokens=12))
    s.add(sequence("short", 4, max_tokens=12))
    s.add(sequence("later", 4, max_tokens=4))
    settle(s, s.plan())  # 2 + 1 + 1 pages
    settle(s, plan := s.plan())  # long needs its third, short its second: later gives way
    assert shape(plan) == [("long", 1), ("short", 1)]
    assert [one.request.id.job_id for one in s.waiting] == ["later"]
    assert s.num_preemptions == 1
    order = []
    while s.has_work:
        order += [one.request.id.job_id for one in settle(s, s.plan())]
    assert sorted(order) == ["later", "long", "short"]
    assert s.pool.num_available == 6


def test_a_preempted_sequence_keeps_its_tokens() -> None:
    s = optimistic(scheduler(num_pages=5, page_size=4))
    a, b = sequence("a", 7, max_tokens=9), sequence("b", 6, max_tokens=6)
    s.add(a)
    s.add(b)
    token = 100
    while s.has_work:
        settle(s, s.plan(), token := token + 1)
    assert b.num_preemptions > 0
    for one in (a, b):
        assert one.output is not None
        assert len(one.output.token_ids) == one.max_tokens
        assert list(one.output.token_ids) == sorted(set(one.output.token_ids))
        assert one.token_ids[: one.num_prompt] == list(one.request.prompt_token_ids)


def test_what_can_never_fit_is_refused_at_the_door() -> None:
    s = scheduler(num_pages=3, page_size=4)
    s.add(sequence("just", 5, max_tokens=8))  # 12 slots: the last token needs none
    with pytest.raises(ValueError, match="cannot fit"):
        s.add(sequence("over", 6, max_tokens=8))


def test_endings() -> None:
    def run(tokens: list[int], **sampling: object) -> Sequence:
        s = scheduler()
        one = sequence("a", 3, **sampling)  # type: ignore[arg-type]
        s.add(one)
        for token in tokens:
            assert one.output is None
            finished = settle(s, s.plan(), token)
        assert finished == [one]
        assert not s.has_work
        assert s.pool.num_available == 64
        return one

    def ending(one: Sequence) -> tuple[object, ...]:
        assert one.output is not None
        return one.output.token_ids, one.output.finish_reason, one.output.stop_reason

    assert ending(run([7, EOS])) == ((7, EOS), "stop", None)
    assert ending(run([7, 9], stop_token_ids=(9,))) == ((7, 9), "stop", 9)
    assert ending(run([EOS, 7], ignore_eos=True, max_tokens=2)) == ((EOS, 7), "length", None)
    assert ending(run([EOS], ignore_eos=True, stop_token_ids=(EOS,))) == ((EOS,), "stop", EOS)
    assert ending(run([9, 9, 9], stop_token_ids=(9,), min_tokens=2)) == ((9, 9, 9), "stop", 9)
    assert ending(run([7], max_tokens=1)) == ((7,), "length", None)
    assert run([7, -1]).output is None  # not finite: it leaves without


def test_a_token_that_is_not_finite_fails_its_sequence_alone() -> None:
    s = scheduler()
    a, b = sequence("a", 3), sequence("b", 3)
    s.add(a)
    s.add(b)
    assert s.settle(s.plan(), [-1, 7]) == [a]
    s.check()
    assert s.running == [b]
    assert b.generated == [7]


def test_logprobs_stay_beside_their_tokens() -> None:
    s = scheduler()
    a, b, c = sequence("a", 3, logprobs=0), sequence("b", 3), sequence("c", 3, logprobs=0, max_tokens=2)
    for one in (a, b, c):
        s.add(one)
    made = [TokenLogprobs(token_id=7, logprob=-float(number)) for number in range(4)]
    s.settle(s.plan(), [7, 7, 7], {0: made[0], 2: made[1]})
    assert s.settle(s.plan(), [-1, 7, 7], {2: made[2]}) == [a, c]
    assert (a.logprobs, b.logprobs, c.logprobs) == ([made[0]], [], [made[1], made[2]])
    assert c.finished_output is not None
    assert c.finished_output.logprobs == (made[1], made[2])
    assert a.finished_output is None
    c.output = Output(token_ids=(7,), finish_reason="stop")  # as a stop string does that was met a token ago
    assert c.finished_output.logprobs == (made[1],)


def test_remove_frees_pages_wherever_the_sequence_is() -> None:
    s = scheduler(seqs=1)
    a, b = sequence("a", 3), sequence("b", 3)
    s.add(a)
    s.add(b)
    settle(s, s.plan())
    s.remove(b)
    s.check()
    s.remove(a)
    s.check()
    assert not s.has_work
    assert s.pool.num_available == 64
    assert s.plan().rows == ()


def random_steps(num_steps: int, seed: int) -> tuple[int, int]:
    """Arrivals, aborts, failures and endings at random; returns (sequences finished, preemptions)."""
    rng = random.Random(seed)
    num_pages, page_size = rng.choice([(8, 4), (16, 4), (30, 16)])
    budget, seqs = rng.choice([3, 17, 64, 2048]), rng.choice([2, 5, 16])
    s = Scheduler(
        PagePool(num_pages, page_size), max_num_seqs=seqs, max_num_batched_tokens=budget, eos_token_ids=[EOS]
    )
    live: dict[Sequence, int] = {}  # to the step of its last token
    num_finished = 0
    for step in range(num_steps):
        while len(live) < 20 and rng.random() < 0.4:
            slots = num_pages * page_size + 1
            num_prompt = rng.randrange(1, slots if rng.random() < 0.1 else slots // 4)
            max_tokens = rng.randrange(1, slots - num_prompt + 1)
            new = sequence(
                f"{step}", num_prompt, max_tokens, min_tokens=rng.randrange(0, min(max_tokens, 20))
            )
            s.add(new)
            live[new] = step
        if live and rng.random() < 0.02:
            gone = rng.choice(list(live))
            s.remove(gone)
            del live[gone]
        s.check()
        plan = optimistic(s).plan()
        s.check()
        assert bool(plan.rows) == s.has_work
        assert plan.num_tokens <= budget
        assert len({row.sequence for row in plan.rows}) == len(plan.rows)
        for row in plan.rows:
            assert row.sequence in s.running
            assert 1 <= row.num_tokens <= row.sequence.num_pending
            assert row.sequence.num_computed + row.num_tokens <= len(row.sequence.pages) * page_size
        tokens = rng.choices([EOS, -1, 7], weights=[3, 0.2, 96.8], k=len(plan.sampling_rows))
        before = {row.sequence: row.sequence.num_generated for row in plan.sampling_rows}
        finished = s.settle(plan, tokens)
        s.check()
        for (one, num_generated), token in zip(before.items(), tokens, strict=True):
            assert one.num_generated == num_generated + (token >= 0)
            assert one.num_generated <= one.max_tokens
        for one in finished:
            num_finished += 1
            del live[one]
            assert (one.output is None) == (tokens[list(before).index(one)] < 0)
        assert set(live) == {*s.running, *s.waiting, *s.warming}
    # Nothing stands still: with no more arrivals everything ends, within a bound that is far from tight.
    for _ in range(200_000):
        if not s.has_work:
            break
        plan = s.plan()
        num_finished += len(s.settle(plan, [7] * len(plan.sampling_rows)))
        s.check()
    assert not s.has_work
    assert s.pool.num_available == num_pages
    return num_finished, s.num_preemptions


def test_two_thousand_random_steps_hold_the_invariant_without_torch() -> None:
    program = textwrap.dedent(
        """
        import sys
        from tests.engine.test_scheduler import random_steps
        outcomes = [random_steps(2000, 0), *(random_steps(250, seed) for seed in range(1, 9))]
        assert sum(finished for finished, _ in outcomes) > 300, outcomes
        assert sum(preemptions for _, preemptions in outcomes) > 100, outcomes
        assert "torch" not in sys.modules
        """
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def with_priority(name: str, priority: int, num_prompt: int = 4, max_tokens: int = 8) -> Sequence:
    one = sequence(name, num_prompt, max_tokens)
    one.request = replace(one.request, priority=priority)
    return one


def test_a_higher_priority_gets_a_place_at_once_when_all_are_taken() -> None:
    s = scheduler(seqs=2)
    for name in "ab":
        s.add(with_priority(name, 2, max_tokens=40))
    settle(s, s.plan())
    s.add(with_priority("fast", 0))
    plan = s.plan()
    assert shape(plan) == [("fast", 4), ("a", 1)], "it takes the place of the one admitted last"
    settle(s, plan)
    order = []
    while s.has_work:
        order += [one.request.id.job_id for one in settle(s, s.plan())]
    assert order == ["fast", "a", "b"]


def with_turn(name: str, turn: float | None, salt: str, priority: int = 0, max_tokens: int = 40) -> Sequence:
    one = sequence(name, 4, max_tokens)
    one.request = replace(one.request, turn=turn, cache_salt=salt, priority=priority)
    return one


def test_a_newcomer_takes_the_place_of_one_that_is_two_turns_later() -> None:
    s = scheduler(seqs=2)
    for name in "ab":
        s.add(with_turn(name, 2.0, "many"))
    settle(s, s.plan())
    s.add(with_turn("new", 0.0, "few", max_tokens=8))
    plan = s.plan()
    assert shape(plan) == [("a", 1), ("new", 4)], "the one admitted last has made way"
    settle(s, plan)
    s.add(with_turn("c", 2.0, "many"))
    s.add(with_turn("other", 0.0, "others", max_tokens=3))
    plan = s.plan()
    assert shape(plan) == [("new", 1), ("other", 4)]
    settle(s, plan)
    order = []
    while s.has_work:
        order += [one.request.id.job_id for one in settle(s, s.plan())]
    assert order == ["other", "new", "a", "b", "c"], "those that made way come before others of their turn"
    assert s.num_preemptions == 2


@pytest.mark.parametrize(
    ("turn", "salt", "priority"),
    [(1.0, "few", 0), (0.0, "many", 0), (None, "few", 0), (0.0, "few", 1)],
    ids=["one turn", "its own asker", "no turn", "a lower priority"],
)
def test_others_wait_for_a_place(turn: float | None, salt: str, priority: int) -> None:
    s = scheduler(seqs=1)
    s.add(with_turn("runs", 2.0, "many"))
    settle(s, s.plan())
    s.add(with_turn("new", turn, salt, priority))
    assert shape(s.plan()) == [("runs", 1)]
    assert s.num_preemptions == 0


def test_who_has_made_way_once_does_so_no_more() -> None:
    s = scheduler(seqs=1)
    s.add(with_turn("runs", 2.0, "many"))
    settle(s, s.plan())
    s.add(with_turn("first", 0.0, "few", max_tokens=2))
    while s.num_waiting:
        settle(s, s.plan())
    s.add(with_turn("second", 0.0, "few"))
    assert shape(s.plan()) == [("runs", 1)]
    assert s.num_preemptions == 1


def test_a_higher_priority_gets_its_tokens_before_the_running() -> None:
    """A long prompt of bulk work takes the whole budget of many steps; it waits, the fast one does not."""
    s = scheduler(num_pages=128, budget=10)
    s.add(with_priority("bulk", 2, num_prompt=100))
    settle(s, s.plan())
    s.add(with_priority("fast", 0, num_prompt=6))
    plan = s.plan()
    assert shape(plan) == [("fast", 6), ("bulk", 4)]
    settle(s, plan)
    assert shape(s.plan()) == [("fast", 1), ("bulk", 9)]


def test_a_higher_priority_does_not_wait_for_the_same_prefix_of_a_lower_one() -> None:
    s = scheduler(num_pages=128, budget=10)
    s.add(with_priority("same", 2, num_prompt=60))
    settle(s, s.plan())
    s.add(with_priority("same", 0, num_prompt=60))
    plan = s.plan()
    assert [row.sequence.request.priority for row in plan.rows] == [0]
    while s.has_work:
        settle(s, plan)
        plan = s.plan()


def test_who_waits_for_a_prefix_is_let_go_when_its_maker_leaves() -> None:
    """Also when no step has computed any of it, as where a device had no memory for the plan."""
    s = scheduler()
    first, second = sequence("same", 20), sequence("same", 20)
    s.add(first)
    s.add(second)
    s.plan()
    assert second in s.warming
    s.remove(first)
    s.check()
    assert [row.sequence for row in s.plan().rows] == [second]
