"""Reads: everything that is asked about jobs and workers without changing them.

Owns the queries behind "how far is it, and what came out?" of jobs, and the frozen values they answer with; batches
are `jobs.batch_reads`'s. Refuses to know how an answer is written (`api.job_objects`). Lists and results go by
keyset, never by OFFSET, so that page 1,000 costs what page 1 costs and a row that is inserted meanwhile shifts
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, bindparam, func, select

from jobs.completion_order import Order
from jobs.database import Database
from jobs.dialects import now, portions
from jobs.keyset import Direction, page
from jobs.models import Job, Result, Worker
from jobs.readiness import Readiness, readiness
from jobs.states import LIVE_WORKER, TERMINAL, JobState, WorkerState
from jobs.terms import Tier, tier_of

CHUNK = 500  # results read at a time
MAX_LIMIT = 100


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. `cached` are those of `prompt` that needed no computing."""

    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A job, with its outputs and usage once it is completed. Times in unix seconds."""

    id: str
    state: JobState
    model: str
    batch_id: str | None
    position: int
    custom_id: str | None
    metadata: dict[str, str]
    created_at: float
    started_at: float | None
    finished_at: float | None
    fair_tag: float
    estimated_tokens: int
    num_samples: int
    attempts: int
    tier: Tier
    priority: int
    not_before: float | None
    deadline: float | None
    error: dict[str, Any] | None
    outputs: list[dict[str, Any]] | None
    usage: Usage | None
    retry_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """What a list of jobs is narrowed to. None: anything. Times in unix seconds, ends excluded.

    `model`, `custom_id` and `state` have no index of their own: the tenant's jobs are looked at from the newest on
    until the page is full, which for a name that few have is all of them; `batch_id` and `created_after` bound that
    by an index. One on `custom_id` would be written three times and more for every job, since PostgreSQL enters each
    change of a job's state into all indexes: the work of a night would pay for a question that is rarely asked.
    """

    state: JobState | None = None
    batch_id: str | None = None
    model: str | None = None
    custom_id: str | None = None
    created_after: float | None = None
    created_before: float | None = None


class Reads:
    """Each call is one short read transaction; `results` is one per chunk.

    What belongs to somebody is asked for under its `tenant`; another's id is answered like one that nobody has."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def job(self, job_id: str, *, tenant: str) -> JobView | None:
        with self._database.read() as connection:
            row = connection.execute(_one_job(), {"id": job_id, "tenant": tenant}).one_or_none()
        return None if row is None else _job_view(row)

    def jobs(
        self,
        only: JobFilter,
        *,
        tenant: str,
        after: str | None = None,
        limit: int = 20,
        direction: Direction = "desc",
    ) -> tuple[list[JobView], bool]:
        """A page of jobs by time of creation, and whether more follow. `after` is the last id of the page
        before. Raises `BadField` when there is no such job."""
        query = _jobs().where(Job.tenant == tenant, *_conditions(only))
        with self._database.read() as connection:
            rows, more = page(
                connection,
                query,
                Job,
                tenant=tenant,
                noun="job",
                after=after,
                limit=limit,
                direction=direction,
            )
        return [_job_view(row) for row in rows], more

    def results(
        self,
        batch_id: str,
        *,
        tenant: str,
        order: Order = Order.INPUT,
        after: int | None = None,
        last: int | None = None,
    ) -> Iterator[JobView]:
        """The finished jobs of a batch in input order, or those that have a place in the order of completion, read a
        chunk at a time, also while it runs. `after` (excluded) and `last`: as a `Page` has them."""
        column, start = order.column, order.first if after is None else after
        while True:
            query = (
                _jobs()
                .add_columns(column.label("cursor"))
                .where(
                    Job.batch_id == batch_id,
                    Job.tenant == tenant,
                    column > start,
                    Job.state.in_(TERMINAL),
                )
                .order_by(column)
                .limit(CHUNK)
            )
            if last is not None:
                query = query.where(column <= last)
            with self._database.read() as connection:
                rows = connection.execute(query).all()
            for row in rows:
                yield _job_view(row)
            if len(rows) < CHUNK:
                return
            start = rows[-1].cursor

    def ended(self, job_ids: Sequence[str]) -> set[str]:
        """Which of these jobs have ended; for those who wait for them, and know whose they are."""
        found: set[str] = set()
        for some in portions(sorted(job_ids)):
            query = select(Job.id).where(Job.id.in_(some), Job.state.in_(TERMINAL))
            with self._database.read() as connection:
                found |= set(connection.scalars(query))
        return found

    def body(self, job_id: str, *, tenant: str) -> dict[str, Any] | None:
        """What a job asks for, as `JobBody.stored` made it."""
        query = select(Job.body).where(Job.id == job_id, Job.tenant == tenant)
        with self._database.read() as connection:
            return connection.scalars(query).one_or_none()

    def models(self) -> dict[str, float]:
        """Models that live workers serve, loaded or still loading, and since when, in unix seconds."""
        query = (
            select(Worker.model, func.min(Worker.started_at).label("since"))
            .where(Worker.state.in_(LIVE_WORKER), Worker.lease_until > now())
            .group_by(Worker.model)
        )
        with self._database.read() as connection:
            return {row.model: row.since for row in connection.execute(query)}

    def readiness(self, stall_seconds: float) -> Readiness:
        with self._database.read() as connection:
            return readiness(connection, stall_seconds)

    def is_worker_ready(self, host: str, pid: int) -> bool:
        """True when the worker that is this very process has loaded its model and holds its lease."""
        query = select(Worker.id).where(
            Worker.host == host,
            Worker.pid == pid,
            Worker.state == WorkerState.READY,
            Worker.lease_until > now(),
        )
        with self._database.read() as connection:
            return connection.execute(query).first() is not None


def job_views(connection: Connection, job_ids: Sequence[str]) -> dict[str, JobView]:
    """Those of these jobs that exist, by id, whosever they are."""
    return {row.id: _job_view(row) for row in connection.execute(_jobs().where(Job.id.in_(job_ids)))}


@cache
def _one_job() -> Select[Any]:
    return _jobs().where(Job.id == bindparam("id"), Job.tenant == bindparam("tenant"))


def _jobs() -> Select[Any]:
    return select(
        Job.id,
        Job.state,
        Job.model,
        Job.batch_id,
        Job.position,
        Job.custom_id,
        Job.info.label("info"),
        Job.created_at,
        Job.started_at,
        Job.finished_at,
        Job.fair_tag,
        Job.estimated_tokens,
        Job.num_samples,
        Job.fence,
        Job.tier,
        Job.priority,
        Job.not_before,
        Job.deadline,
        Job.error,
        Job.retry_of,
        Result.outputs,
        Result.prompt_tokens,
        Result.completion_tokens,
        Result.cached_tokens,
    ).outerjoin(Result, and_(Result.job_id == Job.id, Job.state == JobState.COMPLETED))


def _job_view(row: Row[Any]) -> JobView:
    done = row.prompt_tokens is not None
    return JobView(
        id=row.id,
        state=JobState(row.state),
        model=row.model,
        batch_id=row.batch_id,
        position=row.position,
        custom_id=row.custom_id,
        metadata=row.info,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        fair_tag=row.fair_tag,
        estimated_tokens=row.estimated_tokens,
        num_samples=row.num_samples,
        attempts=row.fence,
        tier=tier_of(row.tier),
        priority=row.priority,
        not_before=row.not_before,
        deadline=row.deadline,
        error=row.error,
        outputs=row.outputs if done else None,
        usage=Usage(row.prompt_tokens, row.completion_tokens, row.cached_tokens) if done else None,
        retry_of=row.retry_of,
    )


def _conditions(only: JobFilter) -> Iterator[ColumnElement[bool]]:
    for column, value in (
        (Job.state, only.state),
        (Job.batch_id, only.batch_id),
        (Job.model, only.model),
        (Job.custom_id, only.custom_id),
    ):
        if value is not None:
            yield column == value
    if only.created_after is not None:
        yield Job.created_at > only.created_after
    if only.created_before is not None:
        yield Job.created_at < only.created_before
