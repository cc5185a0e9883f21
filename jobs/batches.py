"""Batches: the one rule by which a batch closes.

Owns nothing else, so that the API's cancel, the worker's writer and the sweeper cannot disagree about it.
The order of locks is jobs first, then batches, each in id order; whoever follows it cannot deadlock. Because
the batch row is locked before its jobs are looked at, of two transactions that end the last two jobs the
later one sees both ended, and exactly one of them closes the batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, case, exists, select, update

from jobs.database import now
from jobs.models import Batch, Job
from jobs.states import OPEN, BatchState

_RUNNING = (BatchState.IN_PROGRESS, BatchState.CANCELLING)
_MAX_IDS = 500  # per statement


def close_batches(connection: Connection, batch_ids: Iterable[str | None]) -> list[str]:
    """Close those of `batch_ids` that have no open job left; returns their ids.

    Call it in the transaction that moved jobs to a terminal state, after all its updates of jobs. Jobs
    without a batch give None, which is passed over. Safe to repeat.
    """
    ids = sorted({batch_id for batch_id in batch_ids if batch_id is not None})
    closed: list[str] = []
    for start in range(0, len(ids), _MAX_IDS):
        closed += _close(connection, ids[start : start + _MAX_IDS])
    return closed


def _close(connection: Connection, ids: list[str]) -> list[str]:
    connection.execute(select(Batch.id).where(Batch.id.in_(ids)).order_by(Batch.id).with_for_update())
    still_open = exists().where(Job.batch_id == Batch.id, Job.state.in_(OPEN))
    return list(
        connection.scalars(
            update(Batch)
            .where(Batch.id.in_(ids), Batch.state.in_(_RUNNING), ~still_open)
            .values(
                state=case(
                    (Batch.state == BatchState.CANCELLING, BatchState.CANCELLED),
                    else_=BatchState.COMPLETED,
                ),
                finished_at=now(),
            )
            .returning(Batch.id)
        )
    )
