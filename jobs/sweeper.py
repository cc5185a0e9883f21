"""Sweeper: a loop in every worker and every api that repairs what a death left behind.

Owns four repairs, all idempotent and safe to run in many processes at once: leases that expired are marked
lost, jobs that carry the name of a worker that is gone go back to the queue (or end, if they were being
cancelled), cancels of batches that were cut off are finished, and models that have queued jobs and a worker are
announced again, because Redis may have lost the wake-up. It also is the clock of `deadlines`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from jobs import tallies
from jobs.batches import close_batches
from jobs.cancels import Cancels, half_cancelled
from jobs.checkpoints import forget
from jobs.claims import models_with_work
from jobs.database import Database, cause
from jobs.deadlines import MOVES_PER_SWEEP, edges_of_risk, expire, has_due, has_late, make_due, make_urgent
from jobs.dialects import now
from jobs.models import Job, LedgerEntry, Worker
from jobs.outcomes import ending_of
from jobs.states import HELD, LIVE_WORKER, JobState, LedgerKind, WorkerState

log = logging.getLogger(__name__)

REPAIRS_PER_SWEEP = 1000
LOOK_AHEAD_SECONDS = 30.0  # less than the spare time of `deadlines`
STOP_SECONDS = 10.0

_IS_LIVE = Worker.state.in_(sorted(LIVE_WORKER))
_IS_SILENT = and_(_IS_LIVE, Worker.lease_until < now())  # its lease has run out
_STRANDED = select(Job.id).where(
    Job.worker_id.is_not(None),
    Job.worker_id.not_in(select(Worker.id).where(_IS_LIVE)),
    Job.state.in_(sorted(HELD)),
)
_TAKEN_BACK = (
    _STRANDED.with_only_columns(
        Job.id,
        Job.fence,
        Job.state,
        Job.tenant,
        Job.key_id,
        Job.model,
        Job.batch_id,
        Job.estimated_tokens,
        Job.error,
    )
    .order_by(Job.id)
    .limit(REPAIRS_PER_SWEEP)
    .with_for_update(skip_locked=True)
)

StrandedRow = Any  # of `_TAKEN_BACK`


def expire_leases(connection: Connection) -> list[str]:
    """Mark workers whose lease has run out as lost; their names."""
    return list(
        connection.scalars(
            update(Worker).where(_IS_SILENT).values(state=WorkerState.LOST).returning(Worker.id)
        )
    )


def take_back(connection: Connection) -> tuple[int, int]:
    """Requeue, or end as cancelled, the jobs of workers that are gone. Returns how many of each."""
    rows = connection.execute(_TAKEN_BACK).all()
    if not rows:
        return 0, 0
    cancelled = [row for row in rows if row.state == JobState.CANCELLING]
    requeued = [row for row in rows if row.state != JobState.CANCELLING]
    if requeued:
        connection.execute(
            update(Job)
            .where(Job.id.in_([row.id for row in requeued]))
            .values(state=JobState.QUEUED, worker_id=None)
        )
    if cancelled:
        _end(connection, cancelled)
    _book(connection, rows)
    close_batches(connection, {row.batch_id for row in cancelled})
    tallies.add(connection, [tallies.ended(row.tenant, row.estimated_tokens) for row in cancelled])
    return len(requeued), len(cancelled)


def _end(connection: Connection, rows: Sequence[StrandedRow]) -> None:
    """Of jobs that were told to stop."""
    for state in (JobState.CANCELLED, JobState.EXPIRED):
        ids = [row.id for row in rows if ending_of(row.error) is state]
        if ids:
            connection.execute(
                update(Job).where(Job.id.in_(ids)).values(state=state, worker_id=None, finished_at=now())
            )
    forget(connection, [row.id for row in rows])


def _book(connection: Connection, rows: Sequence[StrandedRow]) -> None:
    """What a dead worker had made is not known here; the attempt itself is still on record."""
    connection.execute(
        insert(LedgerEntry).values(created_at=now()),
        [
            {
                "job_id": row.id,
                "fence": row.fence,
                "kind": LedgerKind.CANCELLED if row.state == JobState.CANCELLING else LedgerKind.WASTED,
                "tenant": row.tenant,
                "key_id": row.key_id,
                "model": row.model,
                "batch_id": row.batch_id,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "cached_tokens": 0,
            }
            for row in rows
        ],
    )


class Sweeper(threading.Thread):
    """Runs `sweep` every `sweep_seconds`. `announce(model)` is called for each model that has queued jobs and a live
    worker, and `also` at the end of each sweep."""

    def __init__(
        self,
        database: Database,
        sweep_seconds: float,
        announce: Callable[[str], None],
        also: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="sweeper", daemon=True)
        self.database = database
        self.sweep_seconds = sweep_seconds
        self.announce = announce
        self.also = also
        self._stopping = threading.Event()
        self._look_ahead_at = 0.0

    def run(self) -> None:
        while not self._stopping.wait(self.sweep_seconds):
            try:
                self.sweep()
            except SQLAlchemyError as error:
                log.warning("sweeper.database error=%s", cause(error))
            except Exception:
                log.exception("sweeper.failed")

    def sweep(self) -> None:
        # Look before locking: an idle sweep must not take SQLite's one write lock.
        with self.database.read() as connection:
            silent = bool(connection.scalar(select(Worker.id).where(_IS_SILENT).limit(1)))
            stranded = bool(connection.scalar(_STRANDED.limit(1)))
            models = models_with_work(connection)
            due, late = has_due(connection), has_late(connection)
            to_cancel = half_cancelled(connection)
            edges = edges_of_risk(connection) if self._looks_ahead() else {}
        if due:
            self._until_done(make_due)
        if late:
            self._until_done(expire)
        for model, edge in edges.items():
            self._until_done(partial(make_urgent, model=model, edge=edge))
        for batch_id, tenant in to_cancel:
            Cancels(self.database).cancel_batch(batch_id, tenant=tenant)
        if silent and (lost := self.database.transact(expire_leases)):
            log.warning("sweeper.lost workers=%s", ",".join(lost))
        requeued = cancelled = 0
        while silent or stranded:
            more = self.database.transact(take_back)
            requeued, cancelled = requeued + more[0], cancelled + more[1]
            if sum(more) < REPAIRS_PER_SWEEP:
                break
        if requeued or cancelled:
            log.warning("sweeper.took_back requeued=%d cancelled=%d", requeued, cancelled)
        if due or requeued:
            with self.database.read() as connection:
                models = models_with_work(connection)
        for model in models:
            self.announce(model)
        self.also()

    def _until_done(self, move: Callable[[Connection], int]) -> None:
        """Portion after portion, each its own transaction."""
        while not self._stopping.is_set() and self.database.transact(move) >= MOVES_PER_SWEEP:
            pass

    def _looks_ahead(self) -> bool:
        """Whether it is time to look for deadlines at risk, which reads every queued job that has one."""
        if time.monotonic() < self._look_ahead_at:
            return False
        self._look_ahead_at = time.monotonic() + LOOK_AHEAD_SECONDS
        return True

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join(STOP_SECONDS)
