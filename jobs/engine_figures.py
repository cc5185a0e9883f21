"""EngineFigures: what a worker's engines have told of themselves, the one that runs and those before it.

Owns the sum. Counters of an engine process begin at zero with each start; here they go on, so that a restart does not
look like work undone. Knows the figures' names as little as it must (`Engine.stats` has them).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """`now`: what `Engine.stats` said last, empty while it starts. `before`: the same counters of the engines that
    this worker had earlier, summed."""

    now: dict[str, int | float]
    before: dict[str, int | float]

    def total(self, name: str) -> float:
        return float(self.before.get(name, 0)) + float(self.now.get(name, 0))

    def after_death(self) -> EngineFigures:
        """The engine that told `now` is gone."""
        names = self.now.keys() | self.before.keys()
        return EngineFigures({}, {name: self.before.get(name, 0) + self.now.get(name, 0) for name in names})
