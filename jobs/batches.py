"""Batches: the one rule by which a batch closes.

Owns nothing else, so that the API's cancel, the worker's writer and the sweeper cannot disagree about it. A batch
that came as a file does not close here: it is marked as ready for its output (`finalizing_at`), and closes when that
is written (`jobs.batch_output`). While lines of the file wait to become jobs, neither happens.

The order of locks is jobs first, then batches, each in id order; whoever follows it cannot deadlock. No job is
changed twice in a transaction: PostgreSQL would look up its batch once more, and lock it out of that order. Because
the batch row is locked before its jobs are looked at, of two transactions that end the last two jobs the later one
sees both ended, and exactly one of them closes the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, and_, case, exists, select, update

from jobs.dialects import now, portions
from jobs.models import Batch, Job
from jobs.states import OPEN, BatchState, JobState

_RUNNING = (BatchState.IN_PROGRESS, BatchState.CANCELLING)


def close_batches(connection: Connection, batch_ids: Iterable[str | None]) -> list[str]:
    """Close those of `batch_ids` that have no open job left; returns the ids of those that are closed now.

    Call it in the transaction that moved jobs to a terminal state, after all its updates of jobs. Jobs
    without a batch give None, which is passed over. Safe to repeat.
    """
    ids = sorted({batch_id for batch_id in batch_ids if batch_id is not None})
    closed: list[str] = []
    for some in portions(ids):
        closed += _close(connection, some)
    return closed


def _close(connection: Connection, ids: Sequence[str]) -> list[str]:
    connection.execute(select(Batch.id).where(Batch.id.in_(ids)).order_by(Batch.id).with_for_update())
    still_open = exists().where(Job.batch_id == Batch.id, Job.state.in_(OPEN))
    too_late = exists().where(Job.batch_id == Batch.id, Job.state == JobState.EXPIRED)
    of_file = Batch.input_file_id.is_not(None)
    rows = connection.execute(
        update(Batch)
        .where(
            Batch.id.in_(ids),
            Batch.state.in_(_RUNNING),
            Batch.next_offset.is_(None),
            Batch.finalizing_at.is_(None),
            ~still_open,
        )
        .values(
            state=case(
                (and_(of_file, Batch.state == BatchState.CANCELLING), BatchState.CANCELLING),
                (of_file, BatchState.FINALIZING),
                (and_(too_late, Batch.state != BatchState.CANCELLING), BatchState.EXPIRED),
                (Batch.state == BatchState.CANCELLING, BatchState.CANCELLED),
                else_=BatchState.COMPLETED,
            ),
            finalizing_at=case((of_file, now()), else_=None),
            finished_at=case((of_file, None), else_=now()),
        )
        .returning(Batch.id, Batch.finished_at)
    ).all()
    return [row.id for row in rows if row.finished_at is not None]
