"""The queue's order: levels, siblings together, longest first; against a plain model, and for 20,000 at once."""

from __future__ import annotations

import gc
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.forecast import Forecast
from engine.lengths import OutputLengths
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.waiting import WaitingQueue
from engine.warming import Warming


def sequence(name: str, *, priority: int = 0, turn: float | None = None) -> Sequence:
    request = Request(
        id=RequestId(name, 1),
        prompt_token_ids=(5,),
        sampling=SamplingParams(seed=0),
        priority=priority,
        turn=turn,
    )
    return Sequence(request, 0, 16)


def keys(path: str) -> list[bytes]:
    """A key names all before it, as page keys do."""
    return [path[: i + 1].encode() for i in range(len(path))]


def drain(queue: WaitingQueue) -> list[str]:
    order = []
    while (one := queue.peek()) is not None:
        assert queue.peek() is one
        queue.remove(one)
        order.append(one.request.id.job_id)
    assert len(queue) == 0
    return order


def filled(entries: list[tuple[str, str, int]]) -> WaitingQueue:
    queue = WaitingQueue()
    for name, path, expected in entries:
        queue.push(sequence(name), keys(path), expected)
    return queue


def test_siblings_come_together_and_the_longest_family_first() -> None:
    queue = filled([("a1", "ax", 10), ("b1", "by", 50), ("a2", "ax", 90), ("b2", "bz", 20), ("c", "", 60)])
    assert drain(queue) == ["a2", "a1", "c", "b1", "b2"]


def test_families_within_families() -> None:
    entries = [
        ("1", "sab", 5),
        ("2", "sac", 9),
        ("3", "sd", 7),
        ("4", "sab", 8),
        ("5", "q", 6),
        ("6", "sac", 1),
    ]
    assert drain(filled(entries)) == ["2", "6", "4", "1", "3", "5"]


def test_levels_come_before_all_else() -> None:
    queue = WaitingQueue()
    queue.push(sequence("normal"), keys("a"), 100)
    queue.push(sequence("due", turn=600.0), keys("b"), 1)
    queue.push(sequence("due soon", turn=60.0), keys("c"), 1)
    queue.push(sequence("low", priority=3), keys("a"), 500)
    queue.push(sequence("high", priority=-1), keys("d"), 1)
    assert drain(queue) == ["high", "due soon", "due", "normal", "low"]


def test_whoever_comes_back_is_first_in_its_level() -> None:
    queue = filled([("a", "a", 9), ("b", "b", 5)])
    back, low = sequence("back"), sequence("low", priority=1)
    queue.put_back(low)
    queue.put_back(back)
    assert drain(queue) == ["back", "a", "b", "low"]


def test_first_come_first_served() -> None:
    queue = WaitingQueue("fcfs")
    for name, path, expected in (("a", "x", 1), ("b", "y", 9), ("c", "x", 5)):
        queue.push(sequence(name), keys(path), expected)
    assert drain(queue) == ["a", "b", "c"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.text("ab", max_size=5), st.integers(0, 4), st.integers(0, 1)),
            st.sampled_from(["take", "drop", "back"]),
        ),
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_nobody_is_lost_and_a_family_is_not_torn_apart(history: list[object], rng: random.Random) -> None:
    queue, here, taken = WaitingQueue(), dict[Sequence, str](), list[Sequence]()
    for number, event in enumerate(history):
        if isinstance(event, tuple):
            path, expected, priority = event
            one = sequence(str(number), priority=priority)
            here[one] = path
            queue.push(one, keys(path), expected)
        elif event == "take" and here:
            first = queue.peek()
            assert first is not None
            assert first.request.priority == min(one.request.priority for one in here)
            queue.remove(first)
            del here[first]
            taken.append(first)
        elif event == "drop" and here:
            gone = rng.choice(list(here))
            queue.remove(gone)
            del here[gone]
        elif event == "back" and taken:
            back = taken.pop()
            queue.put_back(back)
            here[back] = ""
        assert set(queue) == set(here)
    fresh = [one for one in here if one not in taken]
    assert len(drain(queue)) == len(fresh)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text("abc", max_size=6), st.integers(0, 9)), min_size=1, max_size=40))
def test_every_family_is_taken_in_one_go(entries: list[tuple[str, int]]) -> None:
    queue = filled([(str(number), path, expected) for number, (path, expected) in enumerate(entries)])
    paths = [entries[int(name)][0] for name in drain(queue)]
    for depth in range(1, 7):
        families = [path[:depth] for path in paths if len(path) >= depth]
        runs = [family for i, family in enumerate(families) if i == 0 or families[i - 1] != family]
        assert len(runs) == len(set(runs))


def test_a_parked_sibling_waits_for_the_last_page_that_is_computed() -> None:
    warming, leader, sibling = Warming(), sequence("leader"), sequence("sibling")
    warming.begin(leader, keys("abc"))
    assert not warming.park(sibling, keys("x"))
    assert warming.park(sibling, keys("abd"))
    warming.check([leader])
    assert warming.done(keys("a")) == []
    assert warming.done([b"ab"]) == [sibling]
    assert warming.park(sibling, [b"abc"])
    with pytest.raises(AssertionError, match="nobody computes"):
        warming.check([])
    assert warming.abandon(leader, keys("abc")) == [sibling]
    assert len(warming) == 0


def test_lengths_are_conditional_means_with_a_ceiling() -> None:
    lengths = OutputLengths()
    assert lengths.expected([], 100) == 100
    for length in (10, 20, 30, 40):
        lengths.observe([], length, cut=False)
    assert lengths.expected([], 100) == 25
    assert lengths.expected([], 24) == 20  # (10 + 20 + 24 + 24) / 4, rounded up
    assert lengths.expected([], 100, 20) == 35
    assert lengths.expected([], 100, 40) == 76
    for _ in range(4):
        lengths.observe([], 7, cut=True)
    assert lengths.expected([], 100, 40) == 100


def test_a_forecast_is_the_peak_of_growing_and_leaving() -> None:
    def plain(tokens: list[int], remaining: list[int]) -> float:
        """Step by step: one token each, and whoever has none left leaves."""
        peak = 0.0
        for step in range(max(remaining)):
            peak = max(peak, sum(t + step + 7.5 for t, r in zip(tokens, remaining, strict=True) if r > step))
        return 3 + peak / 16

    rng = random.Random(3)
    for _ in range(50):
        tokens = [rng.randrange(1, 300) for _ in range(rng.randrange(1, 12))]
        remaining = [rng.randrange(1, 200) for _ in tokens]
        forecast = Forecast(tokens[:-1], remaining[:-1], 3, 16)
        assert forecast.peak_with(tokens[-1], remaining[-1]) == pytest.approx(plain(tokens, remaining))
        forecast.add(tokens[-1], remaining[-1])
        assert forecast.peak_with(0, 1) >= plain(tokens, remaining)


@pytest.mark.parametrize(
    "rare",
    [pytest.param(("b", 10), id="prefix"), pytest.param(("a", 1), id="length")],
)
def test_nobody_is_passed_for_ever_while_work_keeps_coming(rare: tuple[str, int]) -> None:
    queue, waited = WaitingQueue(round_size=8), 0
    for i in range(8):
        queue.push(sequence(f"common {i}"), keys("aa"), 10)
    queue.push(sequence("rare"), keys(rare[0]), rare[1])
    while (one := queue.peek()) is not None and one.request.id.job_id != "rare":
        queue.remove(one)
        waited += 1
        assert waited <= 2 * 8
        queue.push(sequence(f"later {waited}"), keys("aa"), 10)


def test_what_arrives_together_is_planned_together_however_much_it_is() -> None:
    queue = WaitingQueue(round_size=4)
    for i in range(100):
        queue.push(sequence(f"{i}"), keys("ab"[i % 2]), 100 - i)
    order = [int(name) for name in drain(queue)]
    assert order == [*range(0, 100, 2), *range(1, 100, 2)]


def test_the_earlier_of_two_equals_goes_first() -> None:
    assert drain(filled([("1", "a", 5), ("2", "b", 5), ("3", "a", 5), ("4", "", 5)])) == ["1", "3", "2", "4"]


def test_a_family_whose_turn_it_is_ends_before_a_longer_one_that_comes_meanwhile() -> None:
    """Also where it falls into two families, because the newcomer shares less of its prompt."""
    queue = filled([("1", "aab", 9), ("2", "aab", 5), ("3", "b", 7)])
    first = queue.peek()
    assert first is not None
    queue.remove(first)
    queue.push(sequence("4"), keys("b"), 90)
    queue.push(sequence("5"), keys("aac"), 50)
    assert drain(queue) == ["2", "5", "4", "3"]


def test_the_last_that_comes_back_is_the_first() -> None:
    queue = filled([("a", "a", 9)])
    for name in "123":
        queue.put_back(sequence(name))
    assert drain(queue) == ["3", "2", "1", "a"]


def test_who_comes_back_counts_once() -> None:
    """A round is so many that are taken for the first time."""
    queue = WaitingQueue(round_size=2)
    one = sequence("1")
    queue.push(one, keys("a"), 5)
    queue.push(sequence("short"), keys("b"), 1)
    for _ in range(3):
        queue.remove(one)
        queue.put_back(one)
    queue.push(sequence("long"), keys("c"), 9)
    queue.remove(one)
    assert drain(queue) == ["long", "short"]


@pytest.mark.parametrize("others", ["others stay", "nobody stays"])
def test_what_is_taken_out_before_its_turn_leaves_nothing_behind(others: str) -> None:
    """Somebody of higher priority is always there, for weeks; whoever waits behind is aborted, and others come."""

    def alive() -> int:
        gc.collect()
        return sum(type(found) is Sequence for found in gc.get_objects())

    queue, before = WaitingQueue(), alive()
    queue.push(sequence("first"), [], 1)
    if others == "others stay":
        for name, path in (("a", "ab"), ("b", "b")):
            queue.push(sequence(name, priority=1), keys(path), 50)
        back = sequence("back", priority=1)
        queue.put_back(back)
    live = len(queue)
    for number in range(300):
        gone = [sequence(f"{number} {path}", priority=1) for path in ("", "ab", "ac", "abc")]
        gone.append(sequence(f"{number}", priority=1, turn=float(number)))
        for one, path in zip(gone, ("", "ab", "ac", "abc", "a"), strict=True):
            queue.push(one, keys(path), 10)
        for one in gone:
            queue.remove(one)
            queue.put_back(one)
        for one in gone:
            queue.remove(one)
    assert len(queue) == live
    del gone, one
    assert alive() - before < live + 100
    assert len(queue._levels) == len(queue._order) <= 3
