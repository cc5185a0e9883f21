"""Checkpoints: what running jobs have made, in SQL, so that a death or a deploy does not start them over.

Owns the table of that name: saving parts under a claim's fence, putting them together for the next claim, forgetting
them. A part says where it goes on (`Growth.starts`), so any unbroken beginning of the parts is a checkpoint: one that
was lost costs the tokens behind it and nothing else. Parts of other weights than the reader's are passed over. Knows
no threads (`checkpointer`) and no engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from engine import codec
from engine.growth import Growth, join, size_of
from engine.request import Generated, RequestId
from jobs.dialects import Texts, is_among, now, portions
from jobs.models import Checkpoint, Job
from jobs.states import JobState


def save(
    connection: Connection, *, worker_id: str, weights: str, growths: Sequence[Growth]
) -> set[RequestId]:
    """Append a part for each of `growths` whose job still runs under this worker and fence; their ids. The rows are
    locked in id order, so that no part is written behind a job's end."""
    ids = sorted({growth.id.job_id for growth in growths})
    running: set[RequestId] = set()
    for some in portions(ids):
        rows = connection.execute(
            select(Job.id, Job.fence)
            .where(
                Job.id.in_(some),
                Job.worker_id == worker_id,
                Job.state == JobState.IN_PROGRESS,
            )
            .order_by(Job.id)
            .with_for_update(read=True)
        )
        running |= {RequestId(row.id, row.fence) for row in rows}
    kept = [growth for growth in growths if growth.id in running]
    append(connection, weights=weights, growths=kept)
    return {growth.id for growth in kept}


def append(connection: Connection, *, weights: str, growths: Sequence[Growth]) -> None:
    """The same for jobs that the caller has locked. A part that is appended twice does no harm."""
    ids = sorted({growth.id.job_id for growth in growths})
    last: dict[RequestId, int] = {}
    for some in portions(ids):
        parts = connection.execute(
            select(Checkpoint.job_id, Checkpoint.fence, func.max(Checkpoint.part).label("part"))
            .where(Checkpoint.job_id.in_(some))
            .group_by(Checkpoint.job_id, Checkpoint.fence)
        )
        last |= {RequestId(row.job_id, row.fence): row.part for row in parts}
    if growths:
        connection.execute(
            insert(Checkpoint).values(created_at=now()),
            [
                {
                    "job_id": growth.id.job_id,
                    "fence": growth.id.fence,
                    "part": last.get(growth.id, -1) + 1,
                    "weights": weights,
                    "growth": codec.pack(growth),
                }
                for growth in growths
            ],
        )


def load(connection: Connection, job_ids: Iterable[str], weights: str) -> dict[str, tuple[Generated, ...]]:
    """What each job that has a checkpoint has made, one entry per sample."""
    ids = sorted(job_ids)
    parts: defaultdict[str, list[Growth]] = defaultdict(list)
    for some in portions(ids):
        rows = connection.execute(
            select(Checkpoint.job_id, Checkpoint.growth)
            .where(Checkpoint.job_id.in_(some), Checkpoint.weights == weights)
            .order_by(Checkpoint.job_id, Checkpoint.fence, Checkpoint.part)
        )
        for row in rows:
            parts[row.job_id].append(codec.build(Growth, codec.unpack(row.growth)))
    joined = {job_id: join(growths) for job_id, growths in parts.items()}
    return {job_id: generated for job_id, generated in joined.items() if size_of(generated)}


def forget(connection: Connection, job_ids: Iterable[str]) -> None:
    """For jobs that have ended, or must start over."""
    if ids := sorted(job_ids):
        connection.execute(_FORGET, {"ids": ids})


_FORGET = delete(Checkpoint).where(is_among(Checkpoint.__table__.c.job_id, bindparam("ids", type_=Texts)))
