"""Readiness: whether work that waits gets done, model by model.

Owns the question and its reasons. A client may name any model, so one that no worker has ever served is heeded only
where no worker moves at all. Refuses to know who asks.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from shlex import quote
from typing import Final

from sqlalchemy import ColumnElement, Connection, case, func, select

from jobs.conditions import JOB_QUEUED
from jobs.dialects import now
from jobs.models import Job, Worker
from jobs.states import HELD, LIVE_WORKER, WorkerState
from jobs.terms import DELAYED

LOOP_SECONDS: Final = 3600.0
MANY_STARTS: Final = 3  # of engine processes, per worker that lives

_WORK = (
    select(Job.id).where(JOB_QUEUED, Job.tier < DELAYED).limit(1),
    select(Job.id).where(Job.worker_id.is_not(None), Job.state.in_(HELD)).limit(1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether work that is waiting gets done. `reason` says why not."""

    ready: bool
    reason: str | None
    has_work: bool
    num_workers: dict[WorkerState, int] = field(default_factory=dict)  # live ones, by state
    models: tuple[str, ...] = ()  # that ready workers serve


def readiness(connection: Connection, stall_seconds: float) -> Readiness:
    """Ready: there is nothing to do, or each model that has work and was ever served has a worker that moves. It does
    if it is alive and loaded and, where it is busy, its engine has made a step in the last `stall_seconds`."""
    workers = connection.execute(
        select(
            Worker.model,
            Worker.state,
            (Worker.num_running + Worker.num_waiting > 0).label("busy"),
            (now() - func.coalesce(Worker.last_step_at, Worker.started_at)).label("since_step"),
        ).where(Worker.state.in_(LIVE_WORKER), Worker.lease_until > now())
    ).all()
    num_workers: dict[WorkerState, int] = {}
    for worker in workers:
        state = WorkerState(worker.state)
        num_workers[state] = num_workers.get(state, 0) + 1
    moving = {
        worker.model
        for worker in workers
        if worker.state == WorkerState.READY and (not worker.busy or worker.since_step <= stall_seconds)
    }
    reason = None
    if has_work := _has_work(connection):
        ever_served = set(connection.scalars(select(Worker.model).distinct()))
        for model in sorted(ever_served - moving):
            if _has_work(connection, Job.model == model):
                its_own = {worker.state for worker in workers if worker.model == model}
                reason = f"{model}: {_why_not(its_own, stall_seconds)}{_after_starts(connection, model)}"
                if not its_own:
                    reason += f"; start one, or give them up: nightpress cancel --model {quote(model)}"
                break
        else:
            reason = None if moving else _why_not(num_workers, stall_seconds) + _after_starts(connection)
    return Readiness(
        ready=reason is None,
        reason=reason,
        has_work=has_work,
        num_workers=num_workers,
        models=tuple(sorted(moving)),
    )


def _has_work(connection: Connection, *only: ColumnElement[bool]) -> bool:
    return any(connection.execute(query.where(*only)).first() is not None for query in _WORK)


def _why_not(states: Container[str], stall_seconds: float) -> str:
    """`states`: of the live workers, none of which moves."""
    if WorkerState.READY in states:
        return f"no step of any engine in the last {stall_seconds:g} seconds though it is busy"
    if WorkerState.STARTING in states:
        return "jobs are waiting and the worker is still loading its model"
    return "jobs are waiting and no worker is alive to take them"


def _after_starts(connection: Connection, model: str | None = None) -> str:
    """What tells a worker that loads from one that dies of it again and again, or is started again each time; nothing
    of one that does not. Of workers that lived in the last hour."""
    starts = func.sum(case((Worker.engine_starts > 1, Worker.engine_starts), else_=1))
    live = func.count().filter(Worker.state.in_(LIVE_WORKER), Worker.lease_until > now())
    lately = select(func.coalesce(starts, 0), live).where(Worker.lease_until > now() - LOOP_SECONDS)
    if model is not None:
        lately = lately.where(Worker.model == model)
    num_starts, num_live = connection.execute(lately).one()
    if num_starts < MANY_STARTS * max(num_live, 1):
        return ""
    return f", after {num_starts} starts of its engine: the worker's log says why"
