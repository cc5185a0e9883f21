"""Quarantine: the guilty are found by halving, and nobody else is convicted."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.quarantine import SUSPECT, Quarantine, is_guilty, suspicion_after

KILLED = -signal.SIGKILL


class Night:
    """Requests that end when their engine does not die; one engine after another, as a worker would run them."""

    def __init__(self, names: list[str], guilty: set[str], returncode: int) -> None:
        self.suspicion = dict.fromkeys(names, 0)
        self.guilty = guilty
        self.returncode = returncode
        self.quarantine = Quarantine()
        self.deaths = 0
        self.convicted: list[str] = []

    def run(self) -> None:
        while self.suspicion:
            suspects = [name for name, level in self.suspicion.items() if level >= SUSPECT]
            group = self.quarantine.next_group(suspects) if suspects else list(self.suspicion)
            assert group
            if self.guilty.isdisjoint(group):
                for name in group:
                    del self.suspicion[name]
                continue
            self.deaths += 1
            for name in group:
                before = self.suspicion[name]
                after = suspicion_after(before, self.returncode, stalled=False, progressed=False)
                self.suspicion[name] = after
                if suspects and len(group) == 1 and is_guilty(before, after, progressed=False):
                    self.convicted.append(name)
                    del self.suspicion[name]
            self.quarantine.died([name for name in group if self.suspicion.get(name, 0) >= SUSPECT])


@given(
    num_names=st.integers(1, 300),
    num_guilty=st.integers(1, 4),
    returncode=st.sampled_from([7, -11, KILLED]),
    seed=st.integers(0, 2**32),
)
def test_exactly_the_guilty_are_convicted(
    num_names: int, num_guilty: int, returncode: int, seed: int
) -> None:
    names = [str(i) for i in range(num_names)]
    guilty = set(random.Random(seed).sample(names, min(num_guilty, num_names)))
    night = Night(names, guilty, returncode)
    night.run()
    assert set(night.convicted) == guilty
    first = 2 if returncode == KILLED else 1  # deaths before there are suspects
    alone = (num_names == 1) + (returncode == KILLED)  # a SIGKILL while alone may have to come twice
    if len(guilty) == 1:
        assert night.deaths <= first + math.ceil(math.log2(num_names)) + alone


def test_one_of_two_hundred_takes_nine_deaths() -> None:
    night = Night([str(i) for i in range(200)], {"123"}, 7)
    night.run()
    assert night.deaths <= 2 + math.log2(200)


@pytest.mark.parametrize(
    ("before", "returncode", "stalled", "progressed", "after"),
    [
        (0, 7, False, False, 2),  # its own death
        (0, 7, False, True, 2),
        (0, KILLED, True, False, 2),  # it hung, and was killed for it
        (0, KILLED, False, False, 1),
        (1, KILLED, False, False, 2),
        (1, KILLED, False, True, 1),  # it got further in between
        (5, KILLED, False, True, 1),
    ],
)
def test_suspicion(before: int, returncode: int, stalled: bool, progressed: bool, after: int) -> None:
    assert suspicion_after(before, returncode, stalled=stalled, progressed=progressed) == after


def test_a_sigkill_convicts_only_who_met_one_in_quarantine_before() -> None:
    assert not is_guilty(2, 3, progressed=False)
    assert is_guilty(3, 4, progressed=False)
    assert not is_guilty(3, 1, progressed=True)
    assert is_guilty(2, 4, progressed=False)


def lives_of(progress: Callable[[int], bool]) -> int:
    """How many lone deaths it takes to convict one that is suspected. `progress(n)`: whether it got further in its
    n-th life alone."""
    before = SUSPECT
    for life in count(1):
        progressed = progress(life)
        after = suspicion_after(before, 7, stalled=False, progressed=progressed)
        if is_guilty(before, after, progressed=progressed):
            return life
        before = after
    raise AssertionError


def test_a_device_that_fails_now_and_then_convicts_nobody_soon() -> None:
    assert lives_of(lambda life: False) == 1
    assert lives_of(lambda life: life == 1) == 2  # it has come to where it kills
    assert lives_of(lambda life: True) == 8  # seven are spared


def test_a_group_keeps_apart_from_suspects_that_come_later() -> None:
    quarantine = Quarantine()
    quarantine.died(["a", "b", "c"])
    assert quarantine.next_group(["a", "b", "c", "x"]) == ["a", "b"]
    assert quarantine.next_group(["c", "x"]) == ["c"]
    assert quarantine.next_group(["x", "a", "b"]) == ["a", "b"]  # they were on their way
    quarantine.ended(["a", "b"])
    quarantine.died(["c", "d"])
    assert quarantine.next_group(["c", "d"]) == ["c"]
    quarantine.ended(["c"])
    assert quarantine.next_group(["x", "d"]) == ["d"]
    quarantine.ended(["d"])
    assert quarantine.next_group(["x", "y"]) == ["x", "y"]
    assert quarantine.next_group([]) == []
