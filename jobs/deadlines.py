"""Deadlines: what is to happen to open jobs when a moment comes. The sweeper asks, from every worker and every api.

Owns three moves, all idempotent and safe to run in many processes at once: jobs whose `not_before` has come may
start; jobs whose deadline is at risk become urgent; jobs whose deadline has passed expire. One that runs then is told
to stop in the way of a cancel, and its worker, or the sweeper when that is dead, ends it as `expired`.

At risk is what earliest deadline first could only just finish: jobs are taken in the order of their deadlines, and
where the tokens up to there, as estimated at submit, would take the model's live workers longer than is left, all up
to there are urgent. Estimates count `max_tokens`, so they err to the early side; of a model that has no measured
speed a job is urgent for its last ten minutes. (Earliest deadline first is optimal: Liu and Layland 1973.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Final

from sqlalchemy import Connection, Select, bindparam, func, select, update

from jobs import tallies
from jobs.batches import close_batches
from jobs.checkpoints import forget
from jobs.conditions import JOB_DELAYED, JOB_HAS_DEADLINE, JOB_QUEUED, JOB_UNFINISHED
from jobs.counted_tokens import counted_column, longest_contexts
from jobs.dialects import clock, now
from jobs.fair_tags import tags
from jobs.models import Job, Worker
from jobs.states import LIVE_WORKER, JobState
from jobs.terms import DELAYED, Tier, tier_of

MOVES_PER_SWEEP: Final = 1000
SPAN_SECONDS: Final = 60.0  # deadlines within one such span are looked at together
SPARE_SECONDS: Final = 120.0  # urgent so long before it would be too late
UNKNOWN_SECONDS: Final = 600.0  # the same for a model whose speed is not known
EXPIRED_ERROR: Final = {
    "code": "deadline_exceeded",
    "message": "the job had not ended when its deadline passed",
    "param": None,
}


def _due(connection: Connection) -> Select[Any]:
    return select(Job.id).where(JOB_QUEUED, JOB_DELAYED, Job.not_before <= clock(connection))


def _late(connection: Connection) -> Select[Any]:
    return select(Job.id).where(
        JOB_HAS_DEADLINE,
        JOB_UNFINISHED,
        Job.deadline <= clock(connection),
        Job.state != JobState.CANCELLING,
    )


def make_due(connection: Connection) -> int:
    """Jobs whose time has come take their places in the order of work. Returns how many."""
    rows = connection.execute(
        _due(connection)
        .with_only_columns(
            Job.id, Job.tenant, Job.model, Job.tier, Job.priority, Job.estimated_tokens, Job.deadline
        )
        .order_by(Job.not_before, Job.id)
        .limit(MOVES_PER_SWEEP)
        .with_for_update(skip_locked=True)
    ).mappings()
    due = [dict(row) for row in rows]
    if due:
        turns = {row["id"]: turn for row, turn in zip(due, tags(connection, due), strict=True)}
        turns |= {row["id"]: row["deadline"] for row in due if tier_of(row["tier"]) is Tier.URGENT}
        job = Job.__table__
        connection.execute(
            update(Job)
            .where(job.c.id == bindparam("key"))
            .values(tier=job.c.tier - DELAYED, fair_tag=bindparam("new_tag")),
            [{"key": key, "new_tag": turns[key]} for key in sorted(turns)],
        )
    return len(due)


def expire(connection: Connection) -> int:
    """Jobs whose deadline has passed: queued ones end, held ones are told to. Returns how many."""
    rows = connection.execute(
        _late(connection)
        .with_only_columns(Job.id, Job.state, Job.tenant, Job.batch_id, Job.estimated_tokens)
        .order_by(Job.id)
        .limit(MOVES_PER_SWEEP)
        .with_for_update(skip_locked=True)
    ).all()
    queued = [row for row in rows if row.state == JobState.QUEUED]
    held = [row.id for row in rows if row.state == JobState.IN_PROGRESS]
    if queued:
        ids = [row.id for row in queued]
        connection.execute(
            update(Job)
            .where(Job.id.in_(ids))
            .values(state=JobState.EXPIRED, error=EXPIRED_ERROR, finished_at=now())
        )
        forget(connection, ids)
    if held:
        connection.execute(
            update(Job).where(Job.id.in_(held)).values(state=JobState.CANCELLING, error=EXPIRED_ERROR)
        )
    close_batches(connection, {row.batch_id for row in queued})
    tallies.add(connection, [tallies.ended(row.tenant, row.estimated_tokens) for row in queued])
    return len(queued) + len(held)


def edges_of_risk(connection: Connection) -> dict[str, float]:
    """By model, the latest deadline (unix seconds) up to which all queued jobs are at risk."""
    span = func.floor(Job.deadline / SPAN_SECONDS)
    tokens = func.sum(counted_column(longest_contexts(connection))).label("tokens")
    waiting = connection.execute(
        select(Job.model, span.label("span"), tokens)
        .where(JOB_HAS_DEADLINE, JOB_UNFINISHED, JOB_QUEUED, Job.tier == Tier.NORMAL)
        .group_by(Job.model, span)
    ).all()
    if not waiting:
        return {}
    speeds = {
        row.model: float(row.speed or 0.0)
        for row in connection.execute(
            select(Worker.model, func.sum(Worker.tokens_per_second).label("speed"))
            .where(Worker.state.in_(sorted(LIVE_WORKER)), Worker.lease_until > now())
            .group_by(Worker.model)
        )
    }
    time_now = clock(connection)
    by_model: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in waiting:
        by_model[row.model].append(((float(row.span) + 1) * SPAN_SECONDS, int(row.tokens)))
    edges = {
        model: risky_until(spans, speed=speeds.get(model, 0.0), time_now=time_now)
        for model, spans in by_model.items()
    }
    return {model: edge for model, edge in edges.items() if edge is not None}


def risky_until(spans: Iterable[tuple[float, int]], *, speed: float, time_now: float) -> float | None:
    """The end of the last of `spans`, (its end in unix seconds, estimated tokens that are due in it), that is at
    risk with so many tokens per second; None: none is."""
    edge, tokens = None, 0
    for end, more in sorted(spans):
        tokens += more
        needed = tokens / speed + SPARE_SECONDS if speed > 0 else UNKNOWN_SECONDS
        if time_now + needed >= end - SPAN_SECONDS:
            edge = end
    return edge


def make_urgent(connection: Connection, model: str, edge: float) -> int:
    """Normal jobs of `model` that are due before `edge` become urgent, in the order of their deadlines. Returns how
    many; call it again while it is MOVES_PER_SWEEP."""
    ids = list(
        connection.scalars(
            select(Job.id)
            .where(
                JOB_HAS_DEADLINE,
                JOB_UNFINISHED,
                JOB_QUEUED,
                Job.tier == Tier.NORMAL,
                Job.model == model,
                Job.deadline < edge,
            )
            .order_by(Job.deadline, Job.id)
            .limit(MOVES_PER_SWEEP)
            .with_for_update(skip_locked=True)
        )
    )
    if ids:
        connection.execute(
            update(Job).where(Job.id.in_(ids)).values(tier=int(Tier.URGENT), fair_tag=Job.deadline)
        )
    return len(ids)


def _any(connection: Connection, query: Any) -> bool:
    return connection.execute(query.limit(1)).first() is not None


def has_due(connection: Connection) -> bool:
    return _any(connection, _due(connection))


def has_late(connection: Connection) -> bool:
    return _any(connection, _late(connection))
