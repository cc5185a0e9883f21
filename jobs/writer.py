"""Writer: the thread that commits outcomes, many in one transaction.

Owns the spool of outcomes that are not committed yet. It gathers for 20 ms or 256 outcomes, or until one comes that
somebody waits for (`audience`), commits, and only then lets go of the jobs and tells whoever waits (Celery results,
listeners, the claimer). While the database is away the spool waits in memory; it is bounded, because a job keeps its
place in the holdings until it is committed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from engine.request import RequestId
from jobs.audience import Audience
from jobs.database import Database
from jobs.holdings import Holdings
from jobs.outcomes import Outcome, Recorded, record

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.02
GATHER_OUTCOMES = 256
RETRY_SECONDS = 1.0


class Writer(threading.Thread):
    """`worker_id()` names the holder at the moment of writing; `on_recorded` gets each committed group."""

    def __init__(
        self,
        database: Database,
        holdings: Holdings,
        worker_id: Callable[[], str],
        on_recorded: Callable[[list[Recorded]], None],
        weights: str = "",
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self.database = database
        self.holdings = holdings
        self.worker_id = worker_id
        self.on_recorded = on_recorded
        self.weights = weights
        self._spool: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()

    def put(self, outcome: Outcome) -> None:
        self._spool.put(outcome)

    def stop(self, timeout: float) -> None:
        """Commit what was put so far, then end; gives up after `timeout` seconds (leases cover the rest)."""
        self._spool.put(None)
        self.join(timeout)

    def run(self) -> None:
        last = False
        while not last:
            group, last = self._gather()
            if group:
                self._settle(group)

    def _settle(self, group: list[Outcome]) -> None:
        """Commit `group`, however long the database is away; an outcome that it refuses harms only itself."""
        while True:
            try:
                return self._commit(group)
            except Exception as error:
                if isinstance(error, DBAPIError):
                    log.error("writer.database outcomes=%d error=%s", len(group), type(error.orig).__name__)
                    if not isinstance(error, DataError | IntegrityError):
                        time.sleep(RETRY_SECONDS)  # a full disk or a failover is no fault of these jobs
                        continue
                else:
                    log.exception("writer.failed outcomes=%d", len(group))
                if len(group) > 1:
                    for outcome in group:
                        self._settle([outcome])
                    return None
                is_theirs = isinstance(error, DataError | IntegrityError | TypeError | ValueError)
                if group[0].kind != "completed" or not is_theirs:
                    return self._let_go(group)
                group = [_refused(group[0])]

    def _let_go(self, group: list[Outcome]) -> None:
        # Nothing is said in SQL: the lease keeper finds these jobs orphaned and releases them.
        self.holdings.remove([RequestId(outcome.job_id, outcome.fence) for outcome in group])

    def _gather(self) -> tuple[list[Outcome], bool]:
        first = self._spool.get()
        if first is None:
            return [], True
        group = {first.job_id: first}
        deadline = time.monotonic() + (0.0 if self._is_awaited(first) else GATHER_SECONDS)
        while len(group) < GATHER_OUTCOMES:
            try:
                outcome = self._spool.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if outcome is None:
                return list(group.values()), True
            group[outcome.job_id] = outcome
            if self._is_awaited(outcome):
                deadline = 0.0  # what is here already goes along
        return list(group.values()), False

    def _is_awaited(self, outcome: Outcome) -> bool:
        holding = self.holdings.get(RequestId(outcome.job_id, outcome.fence))
        return holding is not None and holding.claim.audience != Audience.NOBODY

    def _commit(self, group: list[Outcome]) -> None:
        worker_id = self.worker_id()
        recorded = self.database.transact(
            lambda connection: record(connection, worker_id=worker_id, outcomes=group, weights=self.weights)
        )
        self.holdings.remove([RequestId(outcome.job_id, outcome.fence) for outcome in group])
        if stale := sum(item.state is None for item in recorded):
            log.warning("writer.stale outcomes=%d", stale)
        self.on_recorded(recorded)


def _refused(outcome: Outcome) -> Outcome:
    return replace(
        outcome,
        kind="failed",
        outputs=[],
        error={"code": "unstorable_output", "message": "the database refused to store this job's output"},
    )
