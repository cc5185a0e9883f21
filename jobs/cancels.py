"""Cancels: the client's wish to end a job or a batch, written into SQL.

Owns the two statements of intent. What runs is stopped by its worker, which hears of `cancelling` with its
next lease renewal, aborts, books the tokens made, and writes `cancelled`; a dead worker's jobs are ended by
the sweeper. Every update names the states it moves from and takes the row lock first, so that a cancel and
a result that meet are put in an order: whichever commits first stands.
"""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from jobs.batches import close_batches
from jobs.database import Database, now
from jobs.models import Batch, Job
from jobs.states import OPEN, BatchState, JobState


class Cancels:
    """Both calls are safe to repeat: a second one changes nothing and answers with what stands."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def cancel_job(self, job_id: str, *, running: bool = True) -> JobState | None:
        """The state after the call: `cancelled` (was queued), `cancelling` (is held by a worker), or the
        terminal state that came first. With `running=False` a job that is held goes on. None when there is
        no such job."""
        return self._database.transact(lambda connection: _cancel_job(connection, job_id, running))

    def cancel_batch(self, batch_id: str) -> BatchState | None:
        """Cancel every open job of a batch. `cancelling` while workers hold some of them, else `cancelled`;
        a batch that had ended keeps its state. None when there is no such batch."""
        return self._database.transact(lambda connection: _cancel_batch(connection, batch_id))


def _cancel_job(connection: Connection, job_id: str, running: bool) -> JobState | None:
    row = connection.execute(
        select(Job.state, Job.batch_id).where(Job.id == job_id).with_for_update()
    ).one_or_none()
    if row is None:
        return None
    if running or row.state == JobState.QUEUED:
        _cancel_locked(connection, [job_id])
    if row.state == JobState.QUEUED:
        close_batches(connection, [row.batch_id])
    return JobState(connection.scalars(select(Job.state).where(Job.id == job_id)).one())


def _cancel_batch(connection: Connection, batch_id: str) -> BatchState | None:
    ids = list(
        connection.scalars(
            select(Job.id)
            .where(Job.batch_id == batch_id, Job.state.in_(OPEN))
            .order_by(Job.id)
            .with_for_update()
        )
    )
    for start in range(0, len(ids), 500):
        _cancel_locked(connection, ids[start : start + 500])
    if ids:
        connection.execute(
            update(Batch)
            .where(Batch.id == batch_id, Batch.state == BatchState.IN_PROGRESS)
            .values(state=BatchState.CANCELLING, cancelling_at=now())
        )
    close_batches(connection, [batch_id])
    state = connection.scalars(select(Batch.state).where(Batch.id == batch_id)).one_or_none()
    return None if state is None else BatchState(state)


def _cancel_locked(connection: Connection, job_ids: list[str]) -> None:
    jobs = update(Job).where(Job.id.in_(job_ids))
    connection.execute(
        jobs.where(Job.state == JobState.QUEUED).values(state=JobState.CANCELLED, finished_at=now())
    )
    connection.execute(jobs.where(Job.state == JobState.IN_PROGRESS).values(state=JobState.CANCELLING))
