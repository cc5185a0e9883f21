"""Quarantine: which requests are suspected of killing engines, and how the guilty one is found.

Owns suspicion, a number that is stored with the job, and the halving of suspects: a group of them has the engine to
itself, and when it dies its halves are tried one after the other. So the guilty one of N is alone after log2 N
further deaths, and only a death while alone convicts, of one that had not got further: engines that die of anything
they compute are never given a job (`canary`), but a device may also fail now and then. Knows no engine, no SQL and no
threads.

A SIGKILL may come from outside, from an operator or from a kernel that is short of memory: one of them makes nobody
a suspect, and a job that had got further since it was claimed starts again at one.
"""

from __future__ import annotations

import signal
from collections.abc import Collection

SUSPECT = 2  # suspicion from which on a request runs in quarantine
SPARED = 8 * SUSPECT  # up to which one is not convicted that gets further in each life of an engine


def suspicion_after(before: int, returncode: int, *, stalled: bool, progressed: bool) -> int:
    """Suspicion of a request that was in an engine which ended with `returncode` (negative: the signal).

    `stalled`: it was killed because it made no steps. `progressed`: since it was handed in, a part of what it made
    was saved.
    """
    if returncode == -signal.SIGKILL and not stalled:
        return 1 if progressed else before + 1
    return before + SUSPECT


def is_guilty(before: int, after: int, *, progressed: bool) -> bool:
    """Whether a request that was alone in the engine killed it: a death of the engine's own does, a SIGKILL only if
    another one has met it in quarantine before. Where it had got further, the device may be what fails now and then:
    who kills engines comes soon to where it does."""
    if progressed and after <= SPARED:
        return False
    return after > before >= SUSPECT and (after - before >= SUSPECT or before > SUSPECT)


class Quarantine:
    """Names are whatever names a request. Not for several threads at a time."""

    def __init__(self) -> None:
        self._groups: list[frozenset[str]] = []  # halves of groups that died, in the order of their trial

    def next_group(self, suspects: Collection[str]) -> list[str]:
        """Those of `suspects` that may be in the engine together, next: of a half of a group that died, else all that
        have not been tried yet. Others of that half may still be on their way back: they keep their place."""
        for half in self._groups:
            if group := [name for name in suspects if name in half]:
                return group
        return list(suspects)

    def ended(self, names: Collection[str]) -> None:
        """These are no longer to be tried."""
        if self._groups:
            self._groups = [left for half in self._groups if (left := half.difference(names))]

    def died(self, group: Collection[str]) -> None:
        """The engine died with these suspects in it."""
        names = list(group)
        self.ended(names)
        middle = -(-len(names) // 2)
        halves = [frozenset(names[:middle]), frozenset(names[middle:])]
        self._groups = [half for half in halves if half] + self._groups
