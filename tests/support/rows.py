"""Small reads of the job tables for tests."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from jobs.database import Database
from jobs.models import Job, LedgerEntry, Result


def jobs_by_state(database: Database) -> dict[str, list[str]]:
    with database.read() as connection:
        rows = connection.execute(select(Job.id, Job.state).order_by(Job.id)).all()
    states: dict[str, list[str]] = {}
    for row in rows:
        states.setdefault(row.state, []).append(row.id)
    return states


def job(database: Database, job_id: str) -> Any:
    with database.read() as connection:
        return connection.execute(select(Job.__table__).where(Job.id == job_id)).one()


def ledger(database: Database) -> list[tuple[str, int, str, int, int]]:
    """(job id, fence, kind, prompt tokens, completion tokens), ordered."""
    columns = (
        LedgerEntry.job_id,
        LedgerEntry.fence,
        LedgerEntry.kind,
        LedgerEntry.prompt_tokens,
        LedgerEntry.completion_tokens,
    )
    with database.read() as connection:
        return [tuple(row) for row in connection.execute(select(*columns).order_by(*columns))]


def results(database: Database) -> dict[str, Any]:
    with database.read() as connection:
        return {row.job_id: row for row in connection.execute(select(Result.__table__))}
