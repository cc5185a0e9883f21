"""StepTimes: which part of a step its time went into.

Owns a stopwatch that changes parts: whoever begins one says so, and it lasts until the next begins. Knows nothing of
what the parts do. Only whole steps count, so that all parts together are the engine's busy seconds.

The time is the host's. A GPU computes on while the host does other things; what it is waited for is in `wait` where
a step's draws are read later, and in `sample` where they are read at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal

Part = Literal["plan", "inputs", "forward", "sample", "wait", "answer"]
PARTS: Final[tuple[Part, ...]] = ("plan", "inputs", "forward", "sample", "wait", "answer")


class StepTimes:
    """`clock`: seconds, from any beginning."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._total = dict.fromkeys(PARTS, 0.0)
        self._step = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "plan"
        self._since = 0.0

    def start(self) -> None:
        """A step begins, with `plan`. One that was not stopped is forgotten."""
        self._step = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "plan", self._clock()

    def begin(self, part: Part) -> None:
        """What is done from now on is `part`. A step may come back to a part."""
        now = self._clock()
        self._step[self._part] += now - self._since
        self._part, self._since = part, now

    def stop(self) -> float:
        """The step is done. Returns its seconds."""
        self.begin("plan")
        for part, seconds in self._step.items():
            self._total[part] += seconds
        seconds = sum(self._step.values())
        self._step = dict.fromkeys(PARTS, 0.0)
        return seconds

    def counters(self) -> dict[str, float]:
        """`<part>_seconds` of all steps, for `Engine.stats`."""
        return {f"{part}_seconds": seconds for part, seconds in self._total.items()}
