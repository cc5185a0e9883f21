"""WorkerReport: what a worker tells of itself with each renewal of its lease.

Owns the columns of its row that others go by: readiness, forecasts, metrics. Figures are what the engine said last;
speeds are taken between two reports. Refuses to know when a report is due (`jobs.lease_keeper`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jobs.dialects import now
from jobs.pace import Pace
from jobs.states import WorkerState
from jobs.supervisor import EngineSupervisor

_SHORTEST_SECONDS = 0.1  # between two reports, for a speed that says anything


class WorkerReport:
    """For one thread. `pace`: learns from each report; replace it to go on from what an earlier worker knew."""

    def __init__(self, supervisor: EngineSupervisor, is_draining: Callable[[], bool]) -> None:
        self.pace = Pace()
        self._supervisor = supervisor
        self._is_draining = is_draining
        self._seen_steps: int | float | None = None
        self._counted = (time.monotonic(), 0.0)  # when, and how many tokens the engine had generated

    def columns(self) -> dict[str, Any]:
        """Of `models.Worker`, as of now."""
        stats, hello = self._supervisor.stats, self._supervisor.hello
        state = WorkerState.READY if hello else WorkerState.STARTING
        self.pace.observe(stats)
        report: dict[str, Any] = {
            "state": WorkerState.DRAINING if self._is_draining() else state,
            "num_running": int(stats.get("num_running", 0)),
            "num_waiting": int(stats.get("num_waiting", 0)),
            "tokens_per_second": self._tokens_per_second(),
            "engine_pid": self._supervisor.pid,
            "engine_starts": self._supervisor.num_starts,
            "stats": dict(stats),
            "pace": self.pace.figures.stored(),
        }
        if hello:  # once known it stays, while its engine is started again: others count by it
            report["max_model_len"] = hello.max_model_len
        if (steps := stats.get("num_steps")) != self._seen_steps:
            self._seen_steps = steps
            report["last_step_at"] = now()
        return report

    def _tokens_per_second(self) -> float:
        """Generated tokens since the last report; 0 after a restart of the engine, which counts anew."""
        before, made_before = self._counted
        at, made = time.monotonic(), float(self._supervisor.stats.get("num_generated_tokens", 0))
        self._counted = at, made
        seconds = at - before
        return max(made - made_before, 0.0) / seconds if seconds > _SHORTEST_SECONDS else 0.0
