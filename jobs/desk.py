"""Desk: which batch needs the work of a clerk, and whose it is for the moment.

Owns the lease on a batch of a file, for its validation, the making of its jobs, or its output. It stands in the
batch's row under a name used once, like a worker's: who lost it, because it was too slow or taken for dead, cannot
write any more, and whoever takes over goes on from what was committed. So a process may die at any moment and nothing
is done twice. Refuses to know what the work is.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any

from sqlalchemy import Connection, exists, or_, select, update
from sqlalchemy.orm import aliased

from jobs.conditions import BATCH_UNFINISHED
from jobs.database import Database
from jobs.dialects import now
from jobs.models import Batch
from jobs.states import BatchState

_LOOK_EVERY = 512  # ticks


class LeaseLost(Exception):
    """Another clerk has the batch, or this process stops."""


class BatchLease:
    """A batch in this clerk's hands. `locked` before every write, `tick` while reading."""

    def __init__(
        self, database: Database, batch_id: str, name: str, seconds: float, stopping: threading.Event
    ) -> None:
        self.batch_id = batch_id
        self._database = database
        self._name = name
        self._seconds = seconds
        self._stopping = stopping
        self._ticks = 0
        self._renewed = time.monotonic()

    def locked(self, connection: Connection) -> Any:
        """The batch's row, locked until the transaction ends, and the lease renewed. Raises `LeaseLost`."""
        row = connection.execute(
            select(*Batch.__table__.columns, now().label("time_now"))
            .where(Batch.id == self.batch_id)
            .with_for_update()
        ).one()
        if row.clerk != self._name:
            raise LeaseLost(self.batch_id)
        connection.execute(
            update(Batch).where(Batch.id == self.batch_id).values(clerk_until=row.time_now + self._seconds)
        )
        self._renewed = time.monotonic()
        return row

    def tick(self) -> None:
        """Call it for every line of a long work: checks now and then."""
        self._ticks += 1
        if self._ticks % _LOOK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Renews the lease when it is time to. Raises `LeaseLost`, also when the batch was cancelled before it had
        any job, and when this process stops."""
        if self._stopping.is_set():
            raise LeaseLost(self.batch_id)
        if time.monotonic() - self._renewed > self._seconds / 3:
            row = self._database.transact(self.locked)
            if row.finished_at is not None:
                raise LeaseLost(self.batch_id)

    def release(self) -> None:
        """Let others go on at once; one that was lost stays with whoever has it now."""
        self._database.transact(
            lambda connection: connection.execute(
                update(Batch)
                .where(Batch.id == self.batch_id, Batch.clerk == self._name)
                .values(clerk=None, clerk_until=None)
            )
        )


def take(database: Database, seconds: float, stopping: threading.Event | None = None) -> BatchLease | None:
    """Lease the batch that waits longest, those of tenants that no clerk works for first; None: nothing to do."""
    other = aliased(Batch)
    served = exists().where(
        other.tenant == Batch.tenant, other.finished_at.is_(None), other.clerk_until > now()
    )
    waiting = (
        select(Batch.id)
        .where(
            BATCH_UNFINISHED,
            Batch.input_file_id.is_not(None),
            or_(
                Batch.state == BatchState.VALIDATING,
                Batch.next_offset.is_not(None),
                Batch.finalizing_at.is_not(None),
            ),
            or_(Batch.clerk_until.is_(None), Batch.clerk_until <= now()),
        )
        .limit(1)
    )
    with database.read() as connection:  # an idle clerk must not take SQLite's one write lock
        if connection.scalars(waiting).first() is None:
            return None
    name = secrets.token_hex(16)

    def work(connection: Connection) -> str | None:
        mine = select(Batch.id).where(Batch.clerk == name, BATCH_UNFINISHED)
        if (known := connection.scalars(mine).first()) is not None:
            return known  # committed before the connection was lost
        batch_id = connection.scalars(
            waiting.order_by(served, Batch.created_at, Batch.id).with_for_update(skip_locked=True, of=Batch)
        ).first()
        if batch_id is not None:
            connection.execute(
                update(Batch).where(Batch.id == batch_id).values(clerk=name, clerk_until=now() + seconds)
            )
        return batch_id

    batch_id = database.transact(work)
    return (
        None
        if batch_id is None
        else BatchLease(database, batch_id, name, seconds, stopping or threading.Event())
    )
