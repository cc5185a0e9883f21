"""Warming: prefixes that are being computed right now, and the siblings that wait for them.

Owns who computes which page first and who is parked until it is there, so that a hundred requests on one new
prefix compute it once instead of a hundred times side by side. Knows no pages and no queue: the scheduler puts
whoever is let go back to the front. Parked sequences count as if they ran, so at most `max_num_seqs` wait here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items

from engine.sequence import Sequence


class Warming:
    def __init__(self) -> None:
        self._leaders: dict[bytes, Sequence] = {}  # page key → who computes it
        self._parked: dict[bytes, list[Sequence]] = {}  # page key → who waits for it, in order
        self._waits_for: dict[Sequence, bytes] = {}

    def __len__(self) -> int:
        """How many are parked."""
        return len(self._waits_for)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waits_for)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._waits_for

    def begin(self, leader: Sequence, keys: Iterable[bytes]) -> None:
        """`leader` will compute these pages, except those that somebody computes already."""
        for key in keys:
            self._leaders.setdefault(key, leader)

    def park(self, sequence: Sequence, missing: Items[bytes]) -> bool:
        """True if somebody computes the first of the pages that `sequence` is missing: then it waits here until
        the last one that is being computed is there. It never waits for one of lower priority."""
        last = None
        for key in missing:
            leader = self._leaders.get(key)
            if leader is None or leader.request.priority > sequence.request.priority:
                break
            last = key
        if last is None:
            return False
        self._parked.setdefault(last, []).append(sequence)
        self._waits_for[sequence] = last
        return True

    def done(self, keys: Iterable[bytes]) -> list[Sequence]:
        """These pages are computed. Returns who waited for them."""
        return [sequence for key in keys if self._leaders.pop(key, None) for sequence in self._let_go(key)]

    def abandon(self, leader: Sequence, keys: Iterable[bytes]) -> list[Sequence]:
        """`leader` leaves before it has computed these. Returns who waited for them."""
        return self.done([key for key in keys if self._leaders.get(key) is leader])

    def remove(self, sequence: Sequence) -> None:
        """It waits no longer. Raises KeyError when it did not."""
        key = self._waits_for.pop(sequence)
        self._parked[key].remove(sequence)

    def _let_go(self, key: bytes) -> list[Sequence]:
        sequences = self._parked.pop(key, [])
        for sequence in sequences:
            del self._waits_for[sequence]
        return sequences

    def check(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError unless whoever waits here waits for a sequence that runs."""
        alive = set(running)
        for sequence, key in self._waits_for.items():
            if self._leaders.get(key) not in alive or sequence not in self._parked.get(key, []):
                raise AssertionError("a sequence waits for a prefix that nobody computes")
