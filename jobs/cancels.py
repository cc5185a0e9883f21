"""Cancels: the wish to end a job, a batch, or all that waits for a model, written into SQL.

Owns the statements of intent. What runs is stopped by its worker, which hears of `cancelling` with its
next lease renewal, aborts, books the tokens made, and writes `cancelled`; a dead worker's jobs are ended by
the sweeper. Every update names the states it moves from and takes the row lock first, so that a cancel and
a result that meet are put in an order: whichever commits first stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, exists, or_, select, update

from jobs import tallies
from jobs.batch_intake import stop_inserting
from jobs.batches import close_batches
from jobs.checkpoints import forget
from jobs.conditions import BATCH_UNFINISHED, JOB_QUEUED
from jobs.database import Database
from jobs.dialects import PORTION, now, portions
from jobs.models import Batch, Job
from jobs.states import OPEN, BatchState, JobState

_RUNNING = and_(Job.worker_id.is_not(None), Job.state == JobState.IN_PROGRESS)
_TO_COME = and_(  # batches of files some lines of which are no jobs yet
    BATCH_UNFINISHED,
    Batch.input_file_id.is_not(None),
    or_(Batch.state == BatchState.VALIDATING, Batch.next_offset.is_not(None)),
)


class ModelCancel(NamedTuple):
    """`jobs`: how many are `cancelled` or `cancelling` by it. `num_files`: batches of files that are still being read
    and may bring more jobs of the model, each of them `cancelled` from its first moment."""

    jobs: Counter[JobState]
    num_files: int


class Cancels:
    """All calls are safe to repeat: a second one changes nothing and answers with what stands."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def cancel_job(self, job_id: str, *, tenant: str) -> JobState | None:
        """The state after the call: `cancelled` (was queued), `cancelling` (is held by a worker), or the
        terminal state that came first. None when the tenant has no such job."""
        theirs = Job.tenant == tenant
        return self._database.transact(
            lambda connection: _cancel_job(connection, job_id, theirs, running=True)
        )

    def revoke(self, job_id: str, *, running: bool) -> JobState | None:
        """The same for a job that came through Redis, by whoever commands the broker, whatever its tenant.
        With `running=False` a job that is held goes on."""
        through_redis = Job.source == "redis"
        return self._database.transact(
            lambda connection: _cancel_job(connection, job_id, through_redis, running=running)
        )

    def cancel_batch(self, batch_id: str, *, tenant: str) -> BatchState | None:
        """Cancel every open job of a batch. `cancelling` while workers hold some of them, else `cancelled`, or for a
        batch of a file until its output is written; a batch that had ended keeps its state. None when the tenant has
        no such batch."""
        # First of all no more jobs come, or some would be made behind the back of those who cancel them.
        self._database.transact(lambda connection: _stop_file_batch(connection, batch_id, tenant))
        return self._database.transact(lambda connection: _cancel_batch(connection, batch_id, tenant))

    def cancel_model(self, model: str, told: Callable[[int], object] = lambda num_jobs: None) -> ModelCancel:
        """Cancel every open job of a model, whoever's, some at a time. For whoever runs the service and has no worker
        for them any more. `told` hears of each portion."""
        # Lines that are still to come first: what is made of them meanwhile either shows below or knows of this.
        with self._database.read() as connection:
            batch_ids = list(connection.scalars(select(Batch.id).where(_TO_COME)))
        stop = partial(_stop_model, model=model)
        num_files = sum(self._database.transact(partial(stop, batch_id=one)) for one in batch_ids)
        moved: Counter[JobState] = Counter()
        for waiting in (JOB_QUEUED, _RUNNING, JOB_QUEUED):  # some may have been handed back meanwhile
            while some := self._database.transact(partial(_cancel_some, model=model, waiting=waiting)):
                moved += some
                told(some.total())
        return ModelCancel(moved, num_files)


def half_cancelled(connection: Connection) -> list[tuple[str, str]]:
    """(batch, tenant) of batches that get no more jobs and have some that nobody has cancelled: whoever was about to
    died, or had no database any more. For a moment this is every batch of a file that is being cancelled."""
    going_on = (JobState.QUEUED, JobState.IN_PROGRESS)
    query = select(Batch.id, Batch.tenant).where(
        BATCH_UNFINISHED,
        Batch.state == BatchState.CANCELLING,
        Batch.finalizing_at.is_(None),
        exists().where(Job.batch_id == Batch.id, Job.state.in_(going_on)),
    )
    return [(row.id, row.tenant) for row in connection.execute(query)]


def _stop_file_batch(connection: Connection, batch_id: str, tenant: str) -> None:
    batch = connection.execute(
        select(*Batch.__table__.columns)
        .where(Batch.id == batch_id, Batch.tenant == tenant, Batch.input_file_id.is_not(None))
        .with_for_update()
    ).one_or_none()
    if batch is None or batch.finished_at is not None or batch.state == BatchState.CANCELLING:
        return
    change = stop_inserting(connection, batch)
    # Before its first job a batch has nothing to wait for.
    at_once = batch.state == BatchState.VALIDATING
    connection.execute(
        update(Batch)
        .where(Batch.id == batch_id)
        .values(
            state=BatchState.CANCELLED if at_once else BatchState.CANCELLING,
            cancelling_at=now(),
            finished_at=now() if at_once else None,
        )
    )
    close_batches(connection, [batch_id])  # nothing may be left to cancel
    tallies.add(connection, [change])


def _stop_model(connection: Connection, *, batch_id: str, model: str) -> bool:
    """Lines of this batch that are to come become cancelled jobs if they name `model`. False: none can be."""
    batch = connection.execute(
        select(Batch.model, Batch.cancelled_models).where(Batch.id == batch_id, _TO_COME).with_for_update()
    ).one_or_none()
    if batch is None or batch.model not in (None, model):
        return False
    known = batch.cancelled_models or []
    if model not in known:
        connection.execute(update(Batch).where(Batch.id == batch_id).values(cancelled_models=[*known, model]))
    return True


def _cancel_job(
    connection: Connection, job_id: str, allowed: ColumnElement[bool], *, running: bool
) -> JobState | None:
    row = connection.execute(
        select(Job.state, Job.batch_id).where(Job.id == job_id, allowed).with_for_update()
    ).one_or_none()
    if row is None:
        return None
    changes = _cancel_locked(connection, [job_id]) if running or row.state == JobState.QUEUED else []
    if row.state == JobState.QUEUED:
        close_batches(connection, [row.batch_id])
    tallies.add(connection, changes)
    return JobState(connection.scalars(select(Job.state).where(Job.id == job_id)).one())


def _cancel_some(connection: Connection, *, model: str, waiting: ColumnElement[bool]) -> Counter[JobState]:
    # In the order of the queue, which is that of an index: without it each portion would look at all rows, those that
    # were cancelled before included, and on SQLite under the one write lock.
    some = select(Job.id).where(waiting, Job.model == model).order_by(Job.tier, Job.fair_tag).limit(PORTION)
    if not (ids := sorted(connection.scalars(some))):
        return Counter()
    rows = connection.execute(
        select(Job.id, Job.state, Job.batch_id).where(Job.id.in_(ids)).order_by(Job.id).with_for_update()
    ).all()
    changes = _cancel_locked(connection, ids)
    close_batches(connection, {row.batch_id for row in rows})
    tallies.add(connection, changes)
    was = Counter(row.state for row in rows)
    moved = {JobState.CANCELLED: was[JobState.QUEUED], JobState.CANCELLING: was[JobState.IN_PROGRESS]}
    return Counter(moved)


def _cancel_batch(connection: Connection, batch_id: str, tenant: str) -> BatchState | None:
    theirs = select(Batch.state).where(Batch.id == batch_id, Batch.tenant == tenant)
    if connection.scalars(theirs).one_or_none() is None:
        return None
    ids = list(
        connection.scalars(
            select(Job.id)
            .where(Job.batch_id == batch_id, Job.tenant == tenant, Job.state.in_(OPEN))
            .order_by(Job.id)
            .with_for_update()
        )
    )
    changes: list[tallies.Change] = []
    for some in portions(ids):
        changes += _cancel_locked(connection, some)
    if ids:
        connection.execute(
            update(Batch)
            .where(Batch.id == batch_id, Batch.state == BatchState.IN_PROGRESS)
            .values(state=BatchState.CANCELLING, cancelling_at=now())
        )
    close_batches(connection, [batch_id])
    tallies.add(connection, changes)
    return BatchState(connection.scalars(theirs).one())


def _cancel_locked(connection: Connection, job_ids: Sequence[str]) -> list[tallies.Change]:
    """What that ends at once leaves its tenant's sums."""
    jobs = update(Job).where(Job.id.in_(job_ids))
    ended = connection.execute(
        jobs.where(Job.state == JobState.QUEUED)
        .values(state=JobState.CANCELLED, finished_at=now())
        .returning(Job.tenant, Job.estimated_tokens)
    ).all()
    connection.execute(jobs.where(Job.state == JobState.IN_PROGRESS).values(state=JobState.CANCELLING))
    forget(connection, job_ids)
    return [tallies.ended(row.tenant, row.estimated_tokens) for row in ended]
