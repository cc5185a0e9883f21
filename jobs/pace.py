"""Pace: how fast a worker's engine computes, and how much of what jobs may generate they do generate.

Owns what is measured and how it is averaged; `jobs.forecasts` makes times of it. Kept in the worker's row, so that
a worker that starts goes on from what the last one of its model knew. All tokens here are computed ones: prompt
tokens that were not cached, and generated ones.

Speeds are averaged by tokens, not by time: a minute's worth of tokens at the known speed is the memory. A full
engine makes most tokens, so an engine that is nearly idle, with the last stragglers of a batch, hardly changes what
is known of a full one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, select

from jobs.counted_tokens import counted
from jobs.models import Worker

MEMORY_SECONDS: Final = 60.0  # of full work
MEMORY_JOBS: Final = 200
_SHORTEST_SECONDS: Final = 0.05  # of engine time that says anything


@dataclass(frozen=True, slots=True)
class Figures:
    """`tokens_per_second`: of the whole engine. `steps_per_second`: and so tokens of one sequence. Of jobs that
    completed lately, older ones counting less: `computed_tokens`, and `estimated_tokens` as at their submit, no more
    than counts (`jobs.counted_tokens`)."""

    tokens_per_second: float | None = None
    steps_per_second: float | None = None
    computed_tokens: float = 0.0
    estimated_tokens: float = 0.0

    def stored(self) -> dict[str, float] | None:
        """As `models.Worker.pace` keeps it; None while nothing is known."""
        if self.tokens_per_second is None or self.steps_per_second is None:
            return None
        return {
            "tokens_per_second": self.tokens_per_second,
            "steps_per_second": self.steps_per_second,
            "computed_tokens": self.computed_tokens,
            "estimated_tokens": self.estimated_tokens,
        }


class Pace:
    """Safe from any thread. `context`: of the engine that runs now, in tokens, as far as it is known."""

    def __init__(self, figures: Figures | None = None) -> None:
        self.context: int | None = None
        self._lock = threading.Lock()
        self._figures = figures or Figures()
        self._before: tuple[float, float, float] | None = None  # counters: busy seconds, tokens, steps

    @property
    def figures(self) -> Figures:
        return self._figures

    def observe(self, stats: Mapping[str, int | float]) -> None:
        """The counters of `Engine.stats`, now; of a new process they begin at 0 again."""
        counters = tuple(
            float(stats.get(name, 0)) for name in ("busy_seconds", "num_computed_tokens", "num_steps")
        )
        with self._lock:
            before, after = self._before or (0.0, 0.0, 0.0), (counters[0], counters[1], counters[2])
            if any(now < then for now, then in zip(after, before, strict=True)):
                before = (0.0, 0.0, 0.0)
            seconds, tokens, steps = (now - then for now, then in zip(after, before, strict=True))
            if seconds < _SHORTEST_SECONDS:
                return
            self._before = after
            known = self._figures
            share = 1.0
            if known.tokens_per_second:
                share = -math.expm1(-tokens / (MEMORY_SECONDS * known.tokens_per_second))
            self._figures = Figures(
                tokens_per_second=_mixed(known.tokens_per_second, tokens / seconds, share),
                steps_per_second=_mixed(known.steps_per_second, steps / seconds, share),
                computed_tokens=known.computed_tokens,
                estimated_tokens=known.estimated_tokens,
            )

    def completed(self, *, computed_tokens: int, estimated_tokens: int, num_samples: int = 1) -> None:
        """One more job has its result."""
        kept = 1 - 1 / MEMORY_JOBS
        with self._lock:
            known = self._figures
            self._figures = Figures(
                tokens_per_second=known.tokens_per_second,
                steps_per_second=known.steps_per_second,
                computed_tokens=known.computed_tokens * kept + computed_tokens,
                estimated_tokens=known.estimated_tokens * kept
                + counted(estimated_tokens, num_samples, self.context),
            )


def _mixed(known: float | None, seen: float, share: float) -> float:
    return seen if known is None else known + share * (seen - known)


def figures_of(stored: Mapping[str, Any] | None) -> Figures:
    stored = stored or {}
    return Figures(
        tokens_per_second=stored.get("tokens_per_second"),
        steps_per_second=stored.get("steps_per_second"),
        computed_tokens=stored.get("computed_tokens", 0.0),
        estimated_tokens=stored.get("estimated_tokens", 0.0),
    )


def last_known(connection: Connection, *, model: str, host: str) -> Figures:
    """What the last worker of `model` knew, of this host if there was one."""
    query = (
        select(Worker.pace)
        .where(Worker.model == model, Worker.pace.is_not(None))
        .order_by((Worker.host == host).desc(), Worker.lease_until.desc())
        .limit(1)
    )
    return figures_of(connection.scalars(query).first())
