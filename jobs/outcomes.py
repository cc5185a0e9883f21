"""Outcome: how one attempt ended, and the one transaction that records it.

Owns the moves out of `in_progress` and `cancelling`, the result row and the ledger row. A job whose row no
longer carries our fence and name is stale: nothing of it is written. Result, usage and state change commit
together, so the billed ledger equals the results at every moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, Double, bindparam, insert, select, update

from engine.growth import Growth
from engine.request import Generated, RequestId
from jobs import tallies
from jobs.batches import close_batches
from jobs.checkpoints import append, forget
from jobs.database import now
from jobs.models import Job, LedgerEntry, Result
from jobs.states import HELD, TERMINAL, JobState, LedgerKind
from jobs.terms import DELAYED, Retry, tier_of

# Reasons that may be gone at the next attempt; all others are the job's own and stay.
PASSING = frozenset({"engine_crash", "numerics", "encode_failed"})

JobRow = Any  # a row of the SELECT in `record`


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`released` puts the job back in the queue; so does `failed`, after a while, where the job's `retry` allows it.

    `completion_tokens`: all that were made; `kept_tokens`: those of a released job that its checkpoint holds.
    `generated`: a released job's checkpoint; None: what is saved stands; (): it starts over. `crashes`: how suspect
    it is now (`quarantine`); None: as before.
    """

    job_id: str
    fence: int
    kind: Literal["completed", "failed", "released"]
    outputs: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    kept_tokens: int = 0
    generated: tuple[Generated, ...] | None = None
    crashes: int | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the transaction made of one outcome. `state` is None when the outcome was stale. Seconds from the job's
    acceptance (or its `not_before`) to its first claim, and to now; None when an earlier try had written it."""

    outcome: Outcome
    state: JobState | None
    source: str = ""
    model: str = ""
    audience: int = 0
    queue_seconds: float | None = None
    seconds: float | None = None


def record(
    connection: Connection, *, worker_id: str, outcomes: Sequence[Outcome], weights: str = ""
) -> list[Recorded]:
    """Write a group of outcomes; rows are locked in id order. Safe to run again after an unknown commit. `weights`:
    of the model that made them (`Checkpoint.fingerprint`)."""
    by_id = {outcome.job_id: outcome for outcome in outcomes}
    held = connection.execute(
        select(
            Job.id,
            Job.fence,
            Job.state,
            Job.worker_id,
            Job.tenant,
            Job.key_id,
            Job.model,
            Job.batch_id,
            Job.source,
            Job.audience,
            Job.crashes,
            Job.estimated_tokens,
            Job.created_at,
            Job.not_before,
            Job.started_at,
            now().label("time_now"),
            Job.error,
            Job.tier,
            Job.retry,
            Job.failures,
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
    _delay(connection, ours, rows)
    _insert_results(connection, [item for item in ours if item.state is JobState.COMPLETED])
    _insert_ledger(connection, ours, rows)
    _keep_checkpoints(connection, ours, weights)
    closing = {rows[item.outcome.job_id].batch_id for item in ours if item.state is not JobState.QUEUED}
    close_batches(connection, sorted(batch_id for batch_id in closing if batch_id))
    tallies.add(connection, [_change(item, rows[item.outcome.job_id]) for item in ours])
    return recorded


def _judge(outcome: Outcome, row: JobRow | None, ours: dict[str, JobRow]) -> Recorded:
    if row is not None and row.id in ours:
        began = max(row.created_at, row.not_before or 0.0)
        return Recorded(
            outcome,
            _next_state(row, outcome),
            row.source,
            row.model,
            row.audience,
            queue_seconds=None if row.started_at is None else max(row.started_at - began, 0.0),
            seconds=max(row.time_now - began, 0.0),
        )
    if row is not None and row.state in TERMINAL:
        # Under this fence only an earlier try of this very transaction, or for a cancel a sweep, wrote that.
        return Recorded(outcome, JobState(row.state), row.source, row.model, row.audience)
    return Recorded(outcome, None)


def _next_state(row: JobRow, outcome: Outcome) -> JobState:
    if row.state == JobState.CANCELLING:
        return ending_of(row.error)  # a cancel that was accepted is final, even if the answer is just ready
    if outcome.kind == "failed" and _may_try_again(row, outcome):
        return JobState.QUEUED
    return {
        "completed": JobState.COMPLETED,
        "failed": JobState.FAILED,
        "released": JobState.QUEUED,
    }[outcome.kind]


def ending_of(error: dict[str, Any] | None) -> JobState:
    """How a job ends that was told to stop: `cancelled`, or `expired` when it was its deadline that said so."""
    return JobState.EXPIRED if error else JobState.CANCELLED


def _may_try_again(row: JobRow, outcome: Outcome) -> bool:
    if row.retry is None or (outcome.error or {}).get("code") not in PASSING:
        return False
    return bool(row.failures + 1 < row.retry["max_attempts"])


def _starts_over(item: Recorded) -> bool:
    return item.state is JobState.QUEUED and item.outcome.kind == "failed"


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
                        "new_error": _error(item, rows[item.outcome.job_id]),
                        "new_crashes": rows[item.outcome.job_id].crashes
                        if item.outcome.crashes is None
                        else item.outcome.crashes,
                    }
                    for item in sorted(group, key=lambda item: item.outcome.job_id)
                ],
            )


def _error(item: Recorded, row: JobRow) -> dict[str, Any] | None:
    if item.state is JobState.EXPIRED:
        return dict(row.error)
    return item.outcome.error if item.state is JobState.FAILED else None


def _delay(connection: Connection, ours: list[Recorded], rows: dict[str, JobRow]) -> None:
    """What failed and may be tried again waits for its time (`jobs.deadlines`)."""
    again = sorted(
        item.outcome.job_id
        for item in ours
        if item.outcome.kind == "failed" and item.state is JobState.QUEUED
    )
    if not again:
        return
    job = Job.__table__
    failures = {key: rows[key].failures + 1 for key in again}
    connection.execute(
        update(Job)
        .where(job.c.id == bindparam("key"))
        .values(
            tier=bindparam("new_tier"),
            failures=bindparam("new_failures"),
            not_before=now() + bindparam("delay", type_=Double),
        ),
        [
            {
                "key": key,
                "new_tier": tier_of(rows[key].tier) + DELAYED,
                "new_failures": failures[key],
                "delay": Retry(**rows[key].retry).delay(failures[key]),
            }
            for key in again
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
            "key_id": rows[item.outcome.job_id].key_id,
            "model": rows[item.outcome.job_id].model,
            "batch_id": rows[item.outcome.job_id].batch_id,
            "prompt_tokens": item.outcome.prompt_tokens,
            "completion_tokens": item.outcome.completion_tokens
            - (item.outcome.kept_tokens if item.state is JobState.QUEUED and not _starts_over(item) else 0),
            "cached_tokens": item.outcome.cached_tokens,
        }
        for item in ours
        # An attempt that never reached the engine made nothing and books nothing.
        if item.state is JobState.COMPLETED or item.outcome.prompt_tokens or item.outcome.completion_tokens
    ]
    if entries:
        connection.execute(insert(LedgerEntry).values(created_at=now()), entries)


def _keep_checkpoints(connection: Connection, ours: list[Recorded], weights: str) -> None:
    released = {
        item.outcome.job_id: item.outcome
        for item in ours
        if item.state is JobState.QUEUED and item.outcome.generated is not None
    }
    forget(
        connection,
        (
            item.outcome.job_id
            for item in ours
            if item.state in TERMINAL or item.outcome.job_id in released or _starts_over(item)
        ),
    )
    append(
        connection,
        weights=weights,
        growths=[
            Growth(
                id=RequestId(outcome.job_id, outcome.fence),
                starts=(0,) * len(outcome.generated),
                generated=outcome.generated,
            )
            for outcome in released.values()
            if outcome.generated
        ],
    )


def _change(item: Recorded, row: JobRow) -> tallies.Change:
    """What this end means for the tenant's sums."""
    if item.state is JobState.QUEUED:
        return tallies.Change(row.tenant)
    completed = item.state is JobState.COMPLETED
    return tallies.Change(
        row.tenant,
        jobs=-1,
        tokens=-row.estimated_tokens,
        stored_bytes=tallies.size_of(item.outcome.outputs) if completed else 0,
        billed=item.outcome.prompt_tokens + item.outcome.completion_tokens if completed else 0,
    )
