"""Sweeper: a loop in every worker and every api that repairs what a death left behind.

Owns three repairs, all idempotent and safe to run in many processes at once: leases that expired are marked
lost, jobs that carry the name of a worker that is gone go back to the queue (or end, if they were being
cancelled), and models that have queued jobs are announced again, because Redis may have lost the wake-up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from jobs.batches import close_batches
from jobs.claims import models_with_work
from jobs.database import Database, now
from jobs.models import Job, LedgerEntry, Worker
from jobs.states import HELD, LIVE_WORKER, JobState, LedgerKind, WorkerState

log = logging.getLogger(__name__)

REPAIRS_PER_SWEEP = 1000
STOP_SECONDS = 10.0

EXPIRED = select(Worker.id).where(Worker.state.in_(sorted(LIVE_WORKER)), Worker.lease_until < now()).limit(1)
LIVE = select(Worker.id).where(Worker.state.in_(sorted(LIVE_WORKER)))
STRANDED = select(Job.id).where(
    Job.worker_id.is_not(None), Job.worker_id.not_in(LIVE), Job.state.in_(sorted(HELD))
)


def expire_leases(connection: Connection) -> list[str]:
    """Mark workers whose lease has run out as lost; their names."""
    return list(
        connection.scalars(
            update(Worker)
            .where(Worker.state.in_(sorted(LIVE_WORKER)), Worker.lease_until < now())
            .values(state=WorkerState.LOST)
            .returning(Worker.id)
        )
    )


def take_back(connection: Connection) -> tuple[int, int]:
    """Requeue, or end as cancelled, the jobs of workers that are gone. Returns how many of each."""
    rows = connection.execute(
        STRANDED.with_only_columns(Job.id, Job.fence, Job.state, Job.tenant, Job.model, Job.batch_id)
        .order_by(Job.id)
        .limit(REPAIRS_PER_SWEEP)
        .with_for_update(skip_locked=True)
    ).all()
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
        connection.execute(
            update(Job)
            .where(Job.id.in_([row.id for row in cancelled]))
            .values(state=JobState.CANCELLED, worker_id=None, finished_at=now())
        )
    # What a dead worker had made is not known here; the attempt itself is still on record.
    connection.execute(
        insert(LedgerEntry).values(created_at=now()),
        [
            {
                "job_id": row.id,
                "fence": row.fence,
                "kind": LedgerKind.CANCELLED if row.state == JobState.CANCELLING else LedgerKind.WASTED,
                "tenant": row.tenant,
                "model": row.model,
                "batch_id": row.batch_id,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "cached_tokens": 0,
            }
            for row in rows
        ],
    )
    close_batches(connection, sorted({row.batch_id for row in cancelled if row.batch_id}))
    return len(requeued), len(cancelled)


class Sweeper(threading.Thread):
    """Runs `sweep` every `sweep_seconds`. `announce(model)` is called for each model that has queued jobs."""

    def __init__(self, database: Database, sweep_seconds: float, announce: Callable[[str], None]) -> None:
        super().__init__(name="sweeper", daemon=True)
        self.database = database
        self.sweep_seconds = sweep_seconds
        self.announce = announce
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self.sweep_seconds):
            try:
                self.sweep()
            except SQLAlchemyError as error:
                log.warning("sweeper.database error=%s", type(error).__name__)
            except Exception:
                log.exception("sweeper.failed")

    def sweep(self) -> None:
        # Look before locking: an idle sweep must not take SQLite's one write lock.
        with self.database.read() as connection:
            expired, stranded = bool(connection.scalar(EXPIRED)), bool(connection.scalar(STRANDED.limit(1)))
            models = models_with_work(connection)
        if expired and (lost := self.database.transact(expire_leases)):
            log.warning("sweeper.lost workers=%s", ",".join(lost))
        requeued = cancelled = 0
        while expired or stranded:
            more = self.database.transact(take_back)
            requeued, cancelled = requeued + more[0], cancelled + more[1]
            if sum(more) < REPAIRS_PER_SWEEP:
                break
        if requeued or cancelled:
            log.warning("sweeper.took_back requeued=%d cancelled=%d", requeued, cancelled)
            with self.database.read() as connection:
                models = models_with_work(connection)
        for model in models:
            self.announce(model)

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join(STOP_SECONDS)
