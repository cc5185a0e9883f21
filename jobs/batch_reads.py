"""BatchReads: how far batches are: one of them, or a page of a tenant's.

Owns the queries, the numbers and bills of a batch's jobs, and the frozen value that they are answered with. Lists go
by keyset like every list. Refuses to know how a batch is shown (`api.batch_objects`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, select

from jobs.database import Database
from jobs.keyset import page
from jobs.models import Batch, Job, LedgerEntry
from jobs.reads import Usage
from jobs.states import BatchState, JobState, LedgerKind

# fmt: off
# Of a batch, those that its view shows as they are.
_PLAIN_COLUMNS = (
    "id", "endpoint", "total", "created_at", "cancelling_at", "finished_at", "input_file_id", "output_file_id",
    "error_file_id", "completion_window", "model", "errors", "in_progress_at", "expires_at", "finalizing_at",
    "num_inserted", "schedule_id", "retry_of",
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchView:
    """A batch with the numbers of its jobs by state (states that no job has are left out)."""

    id: str
    state: BatchState
    endpoint: str
    total: int
    metadata: dict[str, str]
    created_at: float
    cancelling_at: float | None
    finished_at: float | None
    schedule_id: str | None
    input_file_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    completion_window: str | None = None
    model: str | None = None
    errors: list[dict[str, Any]] | None = None  # of the validation: code, line, message, param
    in_progress_at: float | None = None
    expires_at: float | None = None
    finalizing_at: float | None = None
    num_inserted: int = 0  # of a file's `total` lines, those that are jobs by now
    counts: dict[JobState, int]
    usage: Usage
    retry_of: str | None = None

    @property
    def closed(self) -> bool:
        return self.finished_at is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFilter:
    """What a list of batches is narrowed to. None: anything. Times in unix seconds, ends excluded."""

    state: BatchState | None = None
    created_after: float | None = None
    created_before: float | None = None


class BatchReads:
    """Each call is one short read transaction. Another tenant's batch is answered like one that does not exist."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def batch(self, batch_id: str, *, tenant: str) -> BatchView | None:
        query = select(*Batch.__table__.columns).where(Batch.id == batch_id, Batch.tenant == tenant)
        with self._database.read() as connection:
            views = _views(connection, connection.execute(query).all())
        return views[0] if views else None

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
            return _views(connection, rows), more


def _views(connection: Connection, rows: Sequence[Row[Any]]) -> list[BatchView]:
    """Rows of the batches table with the numbers and the bills of their jobs."""
    ids = [row.id for row in rows]
    # A batch's id is enough: its jobs and bills are its tenant's.
    counts: dict[str, dict[JobState, int]] = {batch_id: {} for batch_id in ids}
    for batch_id, state, count in connection.execute(
        select(Job.batch_id, Job.state, func.count())
        .where(Job.batch_id.in_(ids))
        .group_by(Job.batch_id, Job.state)
    ):
        counts[str(batch_id)][JobState(state)] = count
    usage = {
        batch_id: Usage(*map(int, sums))
        for batch_id, *sums in connection.execute(
            select(
                LedgerEntry.batch_id,
                func.sum(LedgerEntry.prompt_tokens),
                func.sum(LedgerEntry.completion_tokens),
                func.sum(LedgerEntry.cached_tokens),
            )
            .where(LedgerEntry.batch_id.in_(ids), LedgerEntry.kind == LedgerKind.BILLED)
            .group_by(LedgerEntry.batch_id)
        )
    }
    return [
        BatchView(
            state=BatchState(row.state),
            metadata=row.metadata,
            counts=counts[row.id],
            usage=usage.get(row.id, Usage(0, 0, 0)),
            **{name: getattr(row, name) for name in _PLAIN_COLUMNS},
        )
        for row in rows
    ]
