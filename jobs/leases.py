"""Leases: one row per worker stands for all jobs that carry its name.

Owns the workers table: registering, renewing, leaving, which models are served. One UPDATE renews everything a
worker holds, and the same transaction brings back which of its jobs are to be cancelled. Every comparison is made on
the database's clock. An expired lease that nobody has swept may still be renewed, so that a slow database costs no
work.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, delete, select, update

from jobs.dialects import insert_into, now
from jobs.models import Job, Worker
from jobs.states import LIVE_WORKER, JobState, WorkerState

FORGET_SECONDS: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Renewal:
    """`held`: (job id, fence) → is it being cancelled, for every job that SQL has in this worker's name."""

    held: dict[tuple[str, int], bool]


def new_worker_id() -> str:
    return f"worker_{socket.gethostname()}_{os.getpid()}_{secrets.token_hex(4)}"


def register(connection: Connection, *, worker_id: str, model: str, lease_seconds: float) -> None:
    """Announce a worker; its lease runs from now. Rows of others that never loaded their model are gone a day after
    their end: whatever starts workers may do so in vain every minute, for weeks."""
    connection.execute(
        delete(Worker).where(Worker.max_model_len.is_(None), Worker.lease_until < now() - FORGET_SECONDS)
    )
    connection.execute(
        insert_into(connection, Worker)
        .values(
            id=worker_id,
            model=model,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=WorkerState.STARTING,
            lease_until=now() + lease_seconds,
            started_at=now(),
            stats={},
        )
        .on_conflict_do_nothing()
    )


def renew(
    connection: Connection, *, worker_id: str, lease_seconds: float, report: dict[str, Any]
) -> Renewal | None:
    """Extend the lease and write `report` (columns of Worker) beside it; None when the lease was swept."""
    renewed = connection.execute(
        update(Worker)
        .where(Worker.id == worker_id, Worker.state.in_(sorted(LIVE_WORKER)))
        .values(lease_until=now() + lease_seconds, **report)
    )
    if renewed.rowcount == 0:
        return None
    rows = connection.execute(select(Job.id, Job.fence, Job.state).where(Job.worker_id == worker_id))
    return Renewal({(row.id, row.fence): row.state == JobState.CANCELLING for row in rows})


def leave(connection: Connection, *, worker_id: str) -> None:
    """Leave in good order; whatever still carries the name is free for the sweeper at once."""
    connection.execute(
        update(Worker)
        .where(Worker.id == worker_id, Worker.state.in_(sorted(LIVE_WORKER)))
        .values(state=WorkerState.STOPPED, lease_until=now(), num_running=0, num_waiting=0)
    )


def served_models(connection: Connection) -> frozenset[str]:
    """Models of workers that live as far as anybody knows: a lease that has run out may still be renewed."""
    return frozenset(connection.scalars(select(Worker.model).where(Worker.state.in_(sorted(LIVE_WORKER)))))
