"""Turns: what calls take that are made in turn, round by round, so that a slow moment meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(calls: Mapping[str, Callable[[], object]], rounds: int, times: int = 1) -> dict[str, float]:
    """Seconds of one call, by name: the median over the rounds, in each of which it is made `times` times."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            for _ in range(times):
                call()
            taken[name].append((time.perf_counter() - begun) / times)
    return {name: statistics.median(took) for name, took in taken.items()}
