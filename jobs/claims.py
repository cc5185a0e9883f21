"""Claims: how a worker takes queued jobs. One statement, one plain index scan.

Owns the order of work (tier, fair tag, prefix group, id) and the fence; how tags are made is `fair_tags`'s.
Knows nothing of tokens or engines.
PostgreSQL skips rows that another worker is claiming; on SQLite the write transaction is the lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Integer,
    bindparam,
    exists,
    func,
    select,
    update,
)

from engine.request import Generated
from jobs.checkpoints import load
from jobs.conditions import JOB_QUEUED
from jobs.dialects import now
from jobs.models import Job, Worker
from jobs.states import LIVE_WORKER, JobState
from jobs.terms import DELAYED, Tier


@dataclass(frozen=True, slots=True)
class Claim:
    """One job in this worker's name. Only writes that carry this `fence` count."""

    job_id: str
    fence: int
    body: dict[str, Any]
    seed: int
    crashes: int
    source: str
    tenant: str
    tier: Tier
    fair_tag: float
    deadline: float | None
    audience: int = 0
    generated: tuple[Generated, ...] = ()  # a checkpoint, where it goes on
    estimated_tokens: int = 0
    num_samples: int = 1
    turn: float = 0.0  # among the jobs of its tier inside the engine (`jobs.claimer`)


def claim(
    connection: Connection,
    *,
    worker_id: str,
    model: str,
    limit: int,
    tiers: tuple[Tier, Tier] = (Tier.INTERACTIVE, Tier.BACKGROUND),
    before: float | None = None,
    weights: str = "",
) -> list[Claim]:
    """Take up to `limit` queued jobs for `model` from the first to the last of `tiers`, in order of work; fewer means
    that nothing else waits there now. They bring their checkpoints, if these `weights` made them. `before`: only
    those whose fair tag is smaller."""
    taken = {
        "holder": worker_id,
        "of_model": model,
        "room": limit,
        "first_tier": int(tiers[0]),
        "last_tier": int(tiers[1]),
    }
    if before is None:
        rows = connection.execute(_CLAIM, taken).all()
    else:
        rows = connection.execute(_CLAIM_BEFORE, taken | {"before": before}).all()
    ordered = sorted(rows, key=lambda row: (row.tier, row.fair_tag, row.prefix_group, row.id))
    generated = load(connection, [row.id for row in ordered if row.fence > 1], weights)
    return [
        Claim(
            job_id=row.id,
            fence=row.fence,
            body=row.body,
            seed=row.seed,
            crashes=row.crashes,
            source=row.source,
            tenant=row.tenant,
            tier=Tier(row.tier),
            fair_tag=row.fair_tag,
            deadline=row.deadline,
            audience=row.audience,
            generated=generated.get(row.id, ()),
            estimated_tokens=row.estimated_tokens,
            num_samples=row.num_samples,
        )
        for row in ordered
    ]


def _claim_of(*conditions: ColumnElement[bool]) -> Any:
    chosen = (
        select(Job.id)
        .where(
            Job.model == bindparam("of_model"),
            Job.tier >= bindparam("first_tier"),
            Job.tier <= bindparam("last_tier"),
            *conditions,
            JOB_QUEUED,
        )
        .order_by(Job.tier, Job.fair_tag, Job.prefix_group, Job.id)
        .limit(bindparam("room", type_=Integer))
        .with_for_update(skip_locked=True)
        # A common table expression runs once; as a plain subquery PostgreSQL may run it for each row it
        # compares, and so claim more than `limit`.
        .cte("chosen")
    )
    return (
        update(Job)
        .where(Job.id.in_(select(chosen.c.id)), JOB_QUEUED)
        .values(
            state=JobState.IN_PROGRESS,
            worker_id=bindparam("holder"),
            fence=Job.fence + 1,
            started_at=func.coalesce(Job.started_at, now()),
        )
        .returning(
            Job.id,
            Job.fence,
            Job.body,
            Job.seed,
            Job.crashes,
            Job.source,
            Job.tenant,
            Job.audience,
            Job.tier,
            Job.fair_tag,
            Job.prefix_group,
            Job.estimated_tokens,
            Job.num_samples,
            Job.deadline,
        )
    )


# Made once: to build them takes longer than to run them.
_CLAIM = _claim_of()
_CLAIM_BEFORE = _claim_of(Job.fair_tag < bindparam("before", type_=Double))


def models_with_work(connection: Connection) -> list[str]:
    """Models that a live worker serves and that have at least one queued job that may start. Asked model by model:
    how many jobs wait, and for how many names that nobody serves, does not matter."""
    waits = exists().where(Job.model == Worker.model, JOB_QUEUED, Job.tier < DELAYED)
    served = select(Worker.model).where(Worker.state.in_(sorted(LIVE_WORKER)), waits)
    return list(connection.scalars(served.distinct()))
