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
from typing import Any, Literal, NamedTuple, cast

from sqlalchemy import Connection, Double, Table, bindparam, select, update

from engine.growth import Growth
from engine.request import Generated, RequestId
from jobs import tallies
from jobs.batches import close_batches
from jobs.bulk_insert import Column, bulk_insert
from jobs.checkpoints import append, forget
from jobs.dialects import Texts, clock, is_among, now
from jobs.json_text import JsonText, written
from jobs.models import Job, LedgerEntry, Result
from jobs.states import HELD, TERMINAL, JobState, LedgerKind
from jobs.terms import DELAYED, Retry, tier_of

# Reasons that may be gone at the next attempt; all others are the job's own and stay.
PASSING = frozenset({"engine_crash", "numerics", "encode_failed"})

HeldRow = Any  # of `_LOCKED`


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


class _Ending(NamedTuple):
    """An outcome that counts: `row` of its job, which is locked and ours, the `state` that follows, and `outputs` as
    a completed job's are stored."""

    outcome: Outcome
    row: HeldRow
    state: JobState
    outputs: JsonText | None

    @property
    def starts_over(self) -> bool:
        return self.state is JobState.QUEUED and self.outcome.kind == "failed"

    @property
    def crashes(self) -> int:
        return int(self.row.crashes if self.outcome.crashes is None else self.outcome.crashes)

    @property
    def error(self) -> dict[str, Any] | None:
        """As the job keeps it."""
        if self.state is JobState.EXPIRED:
            return dict(self.row.error)
        return self.outcome.error if self.state is JobState.FAILED else None


def record(
    connection: Connection, *, worker_id: str, outcomes: Sequence[Outcome], weights: str = ""
) -> list[Recorded]:
    """Write a group of outcomes; rows are locked in id order. Safe to run again after an unknown commit. `weights`:
    of the model that made them (`Checkpoint.fingerprint`)."""
    by_id = {outcome.job_id: outcome for outcome in outcomes}
    locked = connection.execute(_LOCKED, {"ids": sorted(by_id)}).all()
    fenced = {row.id: row for row in locked if row.fence == by_id[row.id].fence}
    ours = {key: row for key, row in fenced.items() if row.worker_id == worker_id and row.state in HELD}
    endings = [_ending(outcome, ours[outcome.job_id]) for outcome in outcomes if outcome.job_id in ours]
    if endings:
        time_now = clock(connection)
        _move(connection, [one for one in endings if not one.starts_over], time_now)
        _delay(connection, [one for one in endings if one.starts_over])
        _insert_results(connection, [one for one in endings if one.outputs is not None], time_now)
        _insert_ledger(connection, endings, time_now)
    _keep_checkpoints(connection, endings, weights)
    close_batches(connection, {one.row.batch_id for one in endings if one.state is not JobState.QUEUED})
    tallies.add(connection, map(_change, endings))
    states = {one.outcome.job_id: one.state for one in endings}
    return [
        _recorded(outcome, fenced.get(outcome.job_id), states.get(outcome.job_id)) for outcome in outcomes
    ]


def _ending(outcome: Outcome, row: HeldRow) -> _Ending:
    state = _next_state(row, outcome)
    return _Ending(outcome, row, state, written(outcome.outputs) if state is JobState.COMPLETED else None)


def _recorded(outcome: Outcome, row: HeldRow | None, state: JobState | None) -> Recorded:
    """`row`: of the job, if its fence is the outcome's; `state`: what this transaction made of it."""
    if row is not None and state is not None:
        began = max(row.created_at, row.not_before or 0.0)
        return Recorded(
            outcome,
            state,
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


def _move(connection: Connection, endings: Sequence[_Ending], time_now: float) -> None:
    """The rows are locked, so those that become the same are changed together."""
    alike: defaultdict[tuple[JobState, int, JsonText | None], list[HeldRow]] = defaultdict(list)
    for one in endings:
        alike[one.state, one.crashes, written(one.error) if one.error else None].append(one.row)
    for (state, crashes, told), rows in alike.items():
        connection.execute(
            _MOVE,
            {
                "ids": sorted(row.id for row in rows),
                "holder": rows[0].worker_id,
                "new_state": state,
                "new_error": told,
                "new_crashes": crashes,
                "ended": None if state is JobState.QUEUED else time_now,
            },
        )


def _delay(connection: Connection, endings: Sequence[_Ending]) -> None:
    """What failed and may be tried again waits for its time (`jobs.deadlines`). Instead of a `_move`, not behind it:
    no job is changed twice in a transaction (`jobs.batches`)."""
    if endings:
        delays = [
            {
                "key": row.id,
                "new_crashes": crashes,
                "new_tier": tier_of(row.tier) + DELAYED,
                "new_failures": row.failures + 1,
                "delay": Retry(**row.retry).delay(row.failures + 1),
            }
            for row, crashes in ((one.row, one.crashes) for one in endings)
        ]
        connection.execute(_DELAY, sorted(delays, key=itemgetter("key")))


def _insert_results(connection: Connection, completed: Sequence[_Ending], time_now: float) -> None:
    if completed:
        outcomes = [one.outcome for one in completed]
        columns: dict[str, Column] = {
            "job_id": [outcome.job_id for outcome in outcomes],
            "outputs": [one.outputs for one in completed],
            "prompt_tokens": [outcome.prompt_tokens for outcome in outcomes],
            "completion_tokens": [outcome.completion_tokens for outcome in outcomes],
            "cached_tokens": [outcome.cached_tokens for outcome in outcomes],
            "created_at": [time_now] * len(completed),
        }
        bulk_insert(connection, _RESULTS, columns)


def _insert_ledger(connection: Connection, endings: Sequence[_Ending], time_now: float) -> None:
    # An attempt that never reached the engine made nothing and books nothing.
    booked = [
        one
        for one in endings
        if one.state is JobState.COMPLETED or one.outcome.prompt_tokens or one.outcome.completion_tokens
    ]
    if not booked:
        return
    outcomes, rows = [one.outcome for one in booked], [one.row for one in booked]
    columns: dict[str, Column] = {
        "job_id": [outcome.job_id for outcome in outcomes],
        "fence": [outcome.fence for outcome in outcomes],
        "kind": [str(_KINDS.get(one.state, LedgerKind.WASTED)) for one in booked],
        "prompt_tokens": [outcome.prompt_tokens for outcome in outcomes],
        "completion_tokens": [
            one.outcome.completion_tokens
            - (one.outcome.kept_tokens if one.state is JobState.QUEUED and not one.starts_over else 0)
            for one in booked
        ],
        "cached_tokens": [outcome.cached_tokens for outcome in outcomes],
        "created_at": [time_now] * len(booked),
        **{name: [getattr(row, name) for row in rows] for name in ("tenant", "key_id", "model", "batch_id")},
    }
    bulk_insert(connection, _LEDGER, columns)


def _keep_checkpoints(connection: Connection, endings: Sequence[_Ending], weights: str) -> None:
    replaced = {
        one.outcome.job_id: one.outcome.generated
        for one in endings
        if one.state is JobState.QUEUED and one.outcome.generated is not None
    }
    forget(
        connection,
        (one.row.id for one in endings if one.state in TERMINAL or one.row.id in replaced or one.starts_over),
    )
    append(
        connection,
        weights=weights,
        growths=[
            Growth(
                id=RequestId(one.row.id, one.row.fence),
                starts=(0,) * len(generated),
                generated=generated,
            )
            for one in endings
            if (generated := replaced.get(one.row.id))
        ],
    )


def _change(ending: _Ending) -> tallies.Change:
    """What this end means for the tenant's sums."""
    outcome, row = ending.outcome, ending.row
    if ending.state is JobState.QUEUED:
        return tallies.Change(row.tenant)
    return tallies.Change(
        row.tenant,
        jobs=-1,
        tokens=-row.estimated_tokens,
        stored_bytes=len(ending.outputs or ""),
        billed=outcome.prompt_tokens + outcome.completion_tokens if ending.outputs is not None else 0,
    )


_KINDS = {JobState.COMPLETED: LedgerKind.BILLED, JobState.CANCELLED: LedgerKind.CANCELLED}
# made once: to build a statement takes as long as to run it
_RESULTS, _LEDGER = cast(Table, Result.__table__), cast(Table, LedgerEntry.__table__)
_NAMED = is_among(Job.__table__.c.id, bindparam("ids", type_=Texts))
_LOCKED = (
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
    .where(_NAMED)
    .order_by(Job.id)
    .with_for_update()
)
_MOVE = (
    update(Job)
    .where(_NAMED, Job.worker_id == bindparam("holder"))
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
