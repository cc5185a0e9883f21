"""BatchReads: pages of a tenant's batches.

Owns the list and its filters, by keyset like every list (`jobs.reads`, which owns the values). Refuses to know how it
is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from jobs.database import Database
from jobs.keyset import page
from jobs.models import Batch
from jobs.reads import BatchView, batch_views
from jobs.states import BatchState


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFilter:
    """What a list of batches is narrowed to. None: anything. Times in unix seconds, ends excluded."""

    state: BatchState | None = None
    created_after: float | None = None
    created_before: float | None = None


class BatchReads:
    def __init__(self, database: Database) -> None:
        self._database = database

    def page(
        self, only: BatchFilter, *, tenant: str, after: str | None, limit: int
    ) -> tuple[list[BatchView], bool]:
        """Batches, newest first, and whether more follow. `after` is the last id of the page before. Raises
        `BadField` when there is no such batch."""
        query = select(*Batch.__table__.columns).where(Batch.tenant == tenant)
        if only.state is not None:
            query = query.where(Batch.state == only.state)
        if only.created_after is not None:
            query = query.where(Batch.created_at > only.created_after)
        if only.created_before is not None:
            query = query.where(Batch.created_at < only.created_before)
        with self._database.read() as connection:
            rows, more = page(connection, query, Batch, tenant=tenant, noun="batch", after=after, limit=limit)
            return batch_views(connection, rows), more
