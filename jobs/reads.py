"""Reads: everything that is asked about jobs, batches and workers without changing them.

Owns the queries behind "how far is it, and what came out?" and the frozen values they answer with. Refuses to
know how an answer is written (`api.schemas`). Lists and results go by keyset, never by OFFSET, so that page
1,000 costs what page 1 costs and a row that is inserted meanwhile shifts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, Row, Select, and_, func, literal_column, select, tuple_

from jobs.body import BadField
from jobs.database import Database, now
from jobs.models import Batch, Job, LedgerEntry, Result, Worker
from jobs.states import HELD, LIVE_WORKER, TERMINAL, BatchState, JobState, LedgerKind, WorkerState

CHUNK = 500  # results read at a time
MAX_LIMIT = 100
# Spelled out, because a bound parameter would keep the database from using the partial indexes.
_QUEUED: ColumnElement[str] = literal_column(f"'{JobState.QUEUED.value}'")


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
    attempts: int
    error: dict[str, Any] | None
    outputs: list[dict[str, Any]] | None
    usage: Usage | None


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
    counts: dict[JobState, int]
    usage: Usage

    @property
    def closed(self) -> bool:
        return self.finished_at is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFilter:
    """What a list of jobs is narrowed to. None: anything. Times in unix seconds, ends excluded."""

    state: JobState | None = None
    batch_id: str | None = None
    model: str | None = None
    custom_id: str | None = None
    created_after: float | None = None
    created_before: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether work that is waiting gets done. `reason` says why not."""

    ready: bool
    reason: str | None
    has_work: bool
    num_workers: dict[WorkerState, int] = field(default_factory=dict)  # live ones, by state
    models: tuple[str, ...] = ()  # that ready workers serve


class Reads:
    """Each call is one short read transaction; `results` is one per chunk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def job(self, job_id: str) -> JobView | None:
        with self._database.read() as connection:
            row = connection.execute(_jobs().where(Job.id == job_id)).one_or_none()
        return None if row is None else _job_view(row)

    def jobs(
        self,
        only: JobFilter,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> tuple[list[JobView], bool]:
        """A page of jobs by time of creation, and whether more follow. `after` is the last id of the page
        before. Raises `BadField` when there is no such job."""
        query = _jobs().where(*_conditions(only)).limit(limit + 1)
        place = tuple_(Job.created_at, Job.id)
        descending = order == "desc"
        query = query.order_by(*((c.desc() for c in (Job.created_at, Job.id)) if descending else place))
        with self._database.read() as connection:
            if after is not None:
                found = connection.execute(
                    select(Job.created_at, Job.id).where(Job.id == after)
                ).one_or_none()
                if found is None:
                    raise BadField("after", "there is no such job")
                edge = tuple_(*found)
                query = query.where(place < edge if descending else place > edge)
            rows = connection.execute(query).all()
        return [_job_view(row) for row in rows[:limit]], len(rows) > limit

    def batch(self, batch_id: str) -> BatchView | None:
        with self._database.read() as connection:
            batch = connection.execute(
                select(*Batch.__table__.columns).where(Batch.id == batch_id)
            ).one_or_none()
            if batch is None:
                return None
            counts = connection.execute(
                select(Job.state, func.count()).where(Job.batch_id == batch_id).group_by(Job.state)
            ).all()
            usage = connection.execute(
                select(
                    func.coalesce(func.sum(LedgerEntry.prompt_tokens), 0),
                    func.coalesce(func.sum(LedgerEntry.completion_tokens), 0),
                    func.coalesce(func.sum(LedgerEntry.cached_tokens), 0),
                ).where(LedgerEntry.batch_id == batch_id, LedgerEntry.kind == LedgerKind.BILLED)
            ).one()
        return BatchView(
            id=batch.id,
            state=BatchState(batch.state),
            endpoint=batch.endpoint,
            total=batch.total,
            metadata=batch.metadata,
            created_at=batch.created_at,
            cancelling_at=batch.cancelling_at,
            finished_at=batch.finished_at,
            counts={JobState(state): count for state, count in counts},
            usage=Usage(*map(int, usage)),
        )

    def results(self, batch_id: str) -> Iterator[JobView]:
        """The finished jobs of a batch in input order, read a chunk at a time, also while it runs."""
        last = -1
        while True:
            query = (
                _jobs()
                .where(Job.batch_id == batch_id, Job.position > last, Job.state.in_(TERMINAL))
                .order_by(Job.position)
                .limit(CHUNK)
            )
            with self._database.read() as connection:
                rows = connection.execute(query).all()
            for row in rows:
                yield _job_view(row)
            if len(rows) < CHUNK:
                return
            last = rows[-1].position

    def readiness(self, stall_seconds: float) -> Readiness:
        """Ready: there is nothing to do, or a live worker is loaded and, if it is busy, its engine has made a
        step in the last `stall_seconds`."""
        with self._database.read() as connection:
            workers = connection.execute(
                select(
                    Worker.model,
                    Worker.state,
                    (Worker.num_running + Worker.num_waiting > 0).label("busy"),
                    (now() - func.coalesce(Worker.last_step_at, Worker.started_at)).label("since_step"),
                ).where(Worker.state.in_(LIVE_WORKER), Worker.lease_until > now())
            ).all()
            queued = select(Job.id).where(Job.state == _QUEUED).limit(1)
            held = select(Job.id).where(Job.worker_id.is_not(None), Job.state.in_(HELD)).limit(1)
            has_work = any(connection.execute(query).first() is not None for query in (queued, held))
        num_workers: dict[WorkerState, int] = {}
        for worker in workers:
            state = WorkerState(worker.state)
            num_workers[state] = num_workers.get(state, 0) + 1
        loaded = [worker for worker in workers if worker.state == WorkerState.READY]
        moving = [worker for worker in loaded if not worker.busy or worker.since_step <= stall_seconds]
        reason = None
        if has_work and not moving:
            if loaded:
                reason = f"no step of any engine in the last {stall_seconds:g} seconds though it is busy"
            elif WorkerState.STARTING in num_workers:
                reason = "jobs are waiting and the worker is still loading its model"
            else:
                reason = "jobs are waiting and no worker is alive to take them"
        return Readiness(
            ready=reason is None,
            reason=reason,
            has_work=has_work,
            num_workers=num_workers,
            models=tuple(sorted({worker.model for worker in moving})),
        )

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
        Job.fence,
        Job.error,
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
        attempts=row.fence,
        error=row.error,
        outputs=row.outputs if done else None,
        usage=Usage(row.prompt_tokens, row.completion_tokens, row.cached_tokens) if done else None,
    )


def _conditions(only: JobFilter) -> Iterator[ColumnElement[bool]]:
    yield Job.tenant == "default"
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
