"""Outcome: how one attempt ended, and the one transaction that records it.

Owns the moves out of `in_progress` and `cancelling`, the result row and the ledger row. A job whose row no
longer carries our fence and name is stale: nothing of it is written. Result, usage and state change commit
together, so the billed ledger equals the results at every moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, bindparam, insert, select, update

from jobs.batches import close_batches
from jobs.database import now
from jobs.models import Job, LedgerEntry, Result
from jobs.states import HELD, JobState, LedgerKind

JobRow = Any  # a row of the SELECT in `record`


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`released` puts the job back in the queue; with `crashed` the engine died while it was running."""

    job_id: str
    fence: int
    kind: Literal["completed", "failed", "released"]
    outputs: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the transaction made of one outcome. `state` is None when the outcome was stale."""

    outcome: Outcome
    state: JobState | None
    source: str = ""
    model: str = ""


def record(connection: Connection, *, worker_id: str, outcomes: Sequence[Outcome]) -> list[Recorded]:
    """Write a group of outcomes; rows are locked in id order. Safe to run again after an unknown commit."""
    by_id = {outcome.job_id: outcome for outcome in outcomes}
    held = connection.execute(
        select(
            Job.id,
            Job.fence,
            Job.state,
            Job.worker_id,
            Job.tenant,
            Job.model,
            Job.batch_id,
            Job.source,
            Job.crashes,
        )
        .where(Job.id.in_(sorted(by_id)))
        .order_by(Job.id)
        .with_for_update()
    ).all()
    fenced = {row.id: row for row in held if row.fence == by_id[row.id].fence}
    rows = {key: row for key, row in fenced.items() if row.worker_id == worker_id and row.state in HELD}
    recorded = [_judge(outcome, fenced.get(outcome.job_id), rows) for outcome in outcomes]
    ours = [item for item in recorded if item.outcome.job_id in rows]
    _move(connection, ours, rows)
    _insert_results(connection, [item for item in ours if item.state is JobState.COMPLETED])
    _insert_ledger(connection, ours, rows)
    closing = {rows[item.outcome.job_id].batch_id for item in ours if item.state is not JobState.QUEUED}
    close_batches(connection, sorted(batch_id for batch_id in closing if batch_id))
    return recorded


def _judge(outcome: Outcome, row: JobRow | None, ours: dict[str, JobRow]) -> Recorded:
    if row is not None and row.id in ours:
        return Recorded(outcome, _next_state(row, outcome), row.source, row.model)
    if row is not None and row.state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED):
        # Under this fence only an earlier try of this very transaction, or for a cancel a sweep, wrote that.
        return Recorded(outcome, JobState(row.state), row.source, row.model)
    return Recorded(outcome, None)


def _next_state(row: JobRow, outcome: Outcome) -> JobState:
    if row.state == JobState.CANCELLING:
        return JobState.CANCELLED  # a cancel that was accepted is final, even if the answer is just ready
    return {
        "completed": JobState.COMPLETED,
        "failed": JobState.FAILED,
        "released": JobState.QUEUED,
    }[outcome.kind]


def _move(connection: Connection, ours: list[Recorded], rows: dict[str, JobRow]) -> None:
    if not ours:
        return
    job = Job.__table__
    statement = (
        update(Job)
        .where(job.c.id == bindparam("key"), job.c.worker_id == bindparam("holder"))
        .values(
            state=bindparam("new_state"),
            worker_id=None,
            error=bindparam("new_error", type_=job.c.error.type),
            crashes=bindparam("new_crashes"),
        )
    )
    for finished in (True, False):
        group = [item for item in ours if (item.state is not JobState.QUEUED) is finished]
        if group:
            connection.execute(
                statement.values(finished_at=now()) if finished else statement,
                [
                    {
                        "key": item.outcome.job_id,
                        "holder": rows[item.outcome.job_id].worker_id,
                        "new_state": item.state,
                        "new_error": item.outcome.error if item.state is JobState.FAILED else None,
                        "new_crashes": rows[item.outcome.job_id].crashes + item.outcome.crashed,
                    }
                    for item in sorted(group, key=lambda item: item.outcome.job_id)
                ],
            )


def _insert_results(connection: Connection, completed: list[Recorded]) -> None:
    if completed:
        connection.execute(
            insert(Result).values(created_at=now()),
            [
                {
                    "job_id": item.outcome.job_id,
                    "outputs": item.outcome.outputs,
                    "prompt_tokens": item.outcome.prompt_tokens,
                    "completion_tokens": item.outcome.completion_tokens,
                    "cached_tokens": item.outcome.cached_tokens,
                }
                for item in completed
            ],
        )


def _insert_ledger(connection: Connection, ours: list[Recorded], rows: dict[str, JobRow]) -> None:
    kinds = {JobState.COMPLETED: LedgerKind.BILLED, JobState.CANCELLED: LedgerKind.CANCELLED}
    entries = [
        {
            "job_id": item.outcome.job_id,
            "fence": item.outcome.fence,
            "kind": kinds.get(item.state, LedgerKind.WASTED) if item.state else "",
            "tenant": rows[item.outcome.job_id].tenant,
            "model": rows[item.outcome.job_id].model,
            "batch_id": rows[item.outcome.job_id].batch_id,
            "prompt_tokens": item.outcome.prompt_tokens,
            "completion_tokens": item.outcome.completion_tokens,
            "cached_tokens": item.outcome.cached_tokens,
        }
        for item in ours
        # An attempt that never reached the engine made nothing and books nothing.
        if item.state is JobState.COMPLETED or item.outcome.prompt_tokens or item.outcome.completion_tokens
    ]
    if entries:
        connection.execute(insert(LedgerEntry).values(created_at=now()), entries)
