"""Outcome: how one attempt ended, and the one transaction that records it.

Owns the moves that a worker makes out of `in_progress` and `cancelling`, the result row and the ledger row. A job
whose row no longer carries our fence and name is stale: nothing of it is written. Result, usage and state change
commit together, so the billed ledger equals the results at every moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, cast

from sqlalchemy import Connection, Double, Table, bindparam, select, update

from engine.growth import Growth
from engine.request import Generated, RequestId
from jobs import tallies
from jobs.batches import close_batches
from jobs.bulk_insert import Column, bulk_insert
from jobs.checkpoints import append, forget
from jobs.database import Texts, clock, is_among, now
from jobs.json_text import JsonText, written
from jobs.models import Job, LedgerEntry, Result
from jobs.states import HELD, TERMINAL, JobState, LedgerKind
from jobs.terms import DELAYED, Retry, tier_of

# Reasons that may be gone at the next attempt; all others are the job's own and stay.
PASSING = frozenset({"engine_crash", "numerics", "encode_failed"})

HeldRow = Any  # a row of the SELECT in `record`


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
    held = connection.execute(_HELD, {"ids": sorted(by_id)}).all()
    fenced = {row.id: row for row in held if row.fence == by_id[row.id].fence}
    rows = {key: row for key, row in fenced.items() if row.worker_id == worker_id and row.state in HELD}
    recorded = [_judge(outcome, fenced.get(outcome.job_id), rows) for outcome in outcomes]
    ours = [item for item in recorded if item.outcome.job_id in rows]
    stored = {
        item.outcome.job_id: written(item.outcome.outputs)
        for item in ours
        if item.state is JobState.COMPLETED
    }
    if ours:
        time_now = clock(connection)
        _move(connection, [item for item in ours if not _starts_over(item)], rows, time_now)
        _delay(connection, [item for item in ours if _starts_over(item)], rows)
        _insert_results(connection, ours, stored, time_now)
        _insert_ledger(connection, ours, rows, time_now)
    _keep_checkpoints(connection, ours, weights)
    close_batches(
        connection, {rows[item.outcome.job_id].batch_id for item in ours if item.state is not JobState.QUEUED}
    )
    tallies.add(
        connection,
        [_change(item, rows[item.outcome.job_id], len(stored.get(item.outcome.job_id, ""))) for item in ours],
    )
    return recorded


def _judge(outcome: Outcome, row: HeldRow | None, ours: dict[str, HeldRow]) -> Recorded:
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


def _next_state(row: HeldRow, outcome: Outcome) -> JobState:
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


def _may_try_again(row: HeldRow, outcome: Outcome) -> bool:
    if row.retry is None or (outcome.error or {}).get("code") not in PASSING:
        return False
    return bool(row.failures + 1 < row.retry["max_attempts"])


def _starts_over(item: Recorded) -> bool:
    return item.state is JobState.QUEUED and item.outcome.kind == "failed"


def _move(connection: Connection, ours: list[Recorded], rows: dict[str, HeldRow], time_now: float) -> None:
    """The rows are locked, so those that become the same are changed together."""
    alike: defaultdict[tuple[JobState, int, JsonText | None], list[str]] = defaultdict(list)
    for item in ours:
        row = rows[item.outcome.job_id]
        error = _error(item, row)
        assert item.state is not None
        alike[item.state, _crashes(item, row), written(error) if error else None].append(row.id)
    for (state, crashes, told), ids in alike.items():
        connection.execute(
            _MOVE,
            {
                "ids": sorted(ids),
                "holder": rows[ids[0]].worker_id,
                "new_state": state,
                "new_error": told,
                "new_crashes": crashes,
                "ended": None if state is JobState.QUEUED else time_now,
            },
        )


def _crashes(item: Recorded, row: HeldRow) -> int:
    return int(row.crashes if item.outcome.crashes is None else item.outcome.crashes)


def _error(item: Recorded, row: HeldRow) -> dict[str, Any] | None:
    if item.state is JobState.EXPIRED:
        return dict(row.error)
    return item.outcome.error if item.state is JobState.FAILED else None


def _delay(connection: Connection, again: list[Recorded], rows: dict[str, HeldRow]) -> None:
    """What failed and may be tried again waits for its time (`jobs.deadlines`).

    Instead of a `_move`, not behind it: of a row that is changed twice PostgreSQL looks up the batch once more, and
    locks it, out of the order of batches."""
    if again:
        delayed = [_delayed(item, rows[item.outcome.job_id]) for item in again]
        connection.execute(_DELAY, sorted(delayed, key=itemgetter("key")))


def _delayed(item: Recorded, row: HeldRow) -> dict[str, Any]:
    failures = row.failures + 1
    return {
        "key": row.id,
        "new_crashes": _crashes(item, row),
        "new_tier": tier_of(row.tier) + DELAYED,
        "new_failures": failures,
        "delay": Retry(**row.retry).delay(failures),
    }


def _insert_results(
    connection: Connection, ours: list[Recorded], stored: dict[str, JsonText], time_now: float
) -> None:
    completed = [item.outcome for item in ours if item.outcome.job_id in stored]
    if completed:
        columns: dict[str, Column] = {
            "job_id": [outcome.job_id for outcome in completed],
            "outputs": [stored[outcome.job_id] for outcome in completed],
            "prompt_tokens": [outcome.prompt_tokens for outcome in completed],
            "completion_tokens": [outcome.completion_tokens for outcome in completed],
            "cached_tokens": [outcome.cached_tokens for outcome in completed],
            "created_at": [time_now] * len(completed),
        }
        bulk_insert(connection, _RESULTS, columns)


def _insert_ledger(
    connection: Connection, ours: list[Recorded], rows: dict[str, HeldRow], time_now: float
) -> None:
    kinds = {JobState.COMPLETED: LedgerKind.BILLED, JobState.CANCELLED: LedgerKind.CANCELLED}
    entries = [
        (item, item.outcome, rows[item.outcome.job_id])
        for item in ours
        # An attempt that never reached the engine made nothing and books nothing.
        if item.state is JobState.COMPLETED or item.outcome.prompt_tokens or item.outcome.completion_tokens
    ]
    if not entries:
        return
    columns: dict[str, Column] = {
        "job_id": [outcome.job_id for _, outcome, _ in entries],
        "fence": [outcome.fence for _, outcome, _ in entries],
        "kind": [
            str(kinds.get(item.state, LedgerKind.WASTED) if item.state else "") for item, _, _ in entries
        ],
        "prompt_tokens": [outcome.prompt_tokens for _, outcome, _ in entries],
        "completion_tokens": [
            outcome.completion_tokens
            - (outcome.kept_tokens if item.state is JobState.QUEUED and not _starts_over(item) else 0)
            for item, outcome, _ in entries
        ],
        "cached_tokens": [outcome.cached_tokens for _, outcome, _ in entries],
        "created_at": [time_now] * len(entries),
        **{
            name: [getattr(row, name) for _, _, row in entries]
            for name in ("tenant", "key_id", "model", "batch_id")
        },
    }
    bulk_insert(connection, _LEDGER, columns)


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


def _change(item: Recorded, row: HeldRow, stored_bytes: int) -> tallies.Change:
    """What this end means for the tenant's sums. `stored_bytes`: of its outputs."""
    if item.state is JobState.QUEUED:
        return tallies.Change(row.tenant)
    completed = item.state is JobState.COMPLETED
    return tallies.Change(
        row.tenant,
        jobs=-1,
        tokens=-row.estimated_tokens,
        stored_bytes=stored_bytes,
        billed=item.outcome.prompt_tokens + item.outcome.completion_tokens if completed else 0,
    )


# made once: to build a statement takes as long as to run it
_RESULTS, _LEDGER = cast(Table, Result.__table__), cast(Table, LedgerEntry.__table__)
_OURS = is_among(Job.__table__.c.id, bindparam("ids", type_=Texts))
_HELD = (
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
    .where(_OURS)
    .order_by(Job.id)
    .with_for_update()
)
_MOVE = (
    update(Job)
    .where(_OURS, Job.worker_id == bindparam("holder"))
    .values(
        state=bindparam("new_state"),
        worker_id=None,
        error=bindparam("new_error", type_=Job.__table__.c.error.type),
        crashes=bindparam("new_crashes"),
        finished_at=bindparam("ended", type_=Double),
    )
)
_DELAY = (
    update(Job)
    .where(Job.__table__.c.id == bindparam("key"))
    .values(
        state=JobState.QUEUED,
        worker_id=None,
        error=None,
        crashes=bindparam("new_crashes"),
        tier=bindparam("new_tier"),
        failures=bindparam("new_failures"),
        not_before=now() + bindparam("delay", type_=Double),
    )
)
