"""The tables, the same on SQLite and PostgreSQL.

Owns columns, keys and indexes; statements live beside the part of the service that needs them. Times are unix
seconds on the database's clock (`dialects.now`). Prompts and outputs are JSON text, so that NUL and other
characters that a text column refuses can be stored on both databases.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, LargeBinary, MetaData, String, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ID = String(255)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        float: Double,
        dict[str, Any]: JSON(none_as_null=True),
        list[dict[str, Any]]: JSON,
        list[str]: JSON(none_as_null=True),
    }


def _partial(name: str, condition: str, *columns: str) -> Index:
    return Index(name, *columns, sqlite_where=text(condition), postgresql_where=text(condition))


class Tenant(Base):
    """Who shares the service. `quotas`: `jobs.tenants.QUOTAS` by name; null: no limit, missing: the default."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    weight: Mapped[float]  # its share of the machines beside others (`jobs.fair_tags`)
    quotas: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class Key(Base):
    """One API key, never its text. Rows stay after a key's end, because jobs and bills name it."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(ID, primary_key=True)  # "key_" and the public part of the text
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(ID)
    hash: Mapped[str] = mapped_column(String(64))  # SHA-256 of the whole text, hex digits
    scopes: Mapped[str] = mapped_column(String(64))  # words with spaces between: read submit admin
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]  # not more exact than a minute

    __table_args__ = (Index(None, "tenant", "created_at"),)


class File(Base):
    """A client's input file, or the output of a batch. Its bytes lie on disk under its id (`jobs.file_store`)."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    tenant: Mapped[str] = mapped_column(ID)
    key_id: Mapped[str | None] = mapped_column(ID)
    purpose: Mapped[str] = mapped_column(String(32))  # `jobs.files.Purpose`
    filename: Mapped[str] = mapped_column(String(512))  # the client's word, never a path of ours
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]

    __table_args__ = (Index(None, "tenant", "created_at", "id"), Index(None, "expires_at"))


class Batch(Base):
    """Jobs handed in together. Counts are never stored: they are counted from the jobs.

    The columns from `input_file_id` on belong to batches that came as a file. Until `next_offset` is null, lines of
    the file wait to become jobs, and what the tenant's sums hold for them is `total - num_inserted` jobs,
    `reserved_tokens` and `reserved_bytes`.
    """

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    tenant: Mapped[str] = mapped_column(ID)
    key_id: Mapped[str | None] = mapped_column(ID)  # who asked; None: nobody needed a key
    state: Mapped[str] = mapped_column(String(16))
    endpoint: Mapped[str] = mapped_column(String(64))
    total: Mapped[int]
    info: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    created_at: Mapped[float]
    cancelling_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    schedule_id: Mapped[str | None] = mapped_column(ID)  # whose run it is
    retry_of: Mapped[str | None] = mapped_column(ID)  # the batch whose jobs these are once more
    num_placed: Mapped[int] = mapped_column(server_default=text("0"))  # of its jobs, `Job.place`

    # No foreign keys: a file may go when its batch has ended.
    input_file_id: Mapped[str | None] = mapped_column(ID)
    output_file_id: Mapped[str | None] = mapped_column(ID)
    error_file_id: Mapped[str | None] = mapped_column(ID)
    output_expires_seconds: Mapped[int | None]  # after the output's creation
    completion_window: Mapped[str | None] = mapped_column(String(16))
    expires_at: Mapped[float | None]  # the window's end
    model: Mapped[str | None] = mapped_column(ID)  # of all lines, where they agree
    errors: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True))  # of the validation
    in_progress_at: Mapped[float | None]
    finalizing_at: Mapped[float | None]
    next_offset: Mapped[int | None] = mapped_column(BigInteger)  # where the first line without a job begins
    num_inserted: Mapped[int] = mapped_column(server_default=text("0"))
    reserved_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    reserved_bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    cancelled_models: Mapped[list[str] | None]  # lines that name one of these become jobs that are cancelled
    clerk: Mapped[str | None] = mapped_column(String(32))  # who works on it (`jobs.desk`), until when
    clerk_until: Mapped[float | None]

    __table_args__ = (
        Index(None, "tenant", "created_at", "id"),
        _partial("ix_batches_open", "finished_at IS NULL", "created_at"),
        Index(None, "input_file_id"),
    )


class Job(Base):
    """One generation: the unit of state, retry, cancel and usage.

    `body` is the validated `jobs.body.JobBody` as JSON. `tier`, `fair_tag`, `prefix_group`, `id` are
    the order of work. `fence` grows at every claim; `crashes` is how suspect engine deaths have made it
    (`jobs.quarantine`).
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    tenant: Mapped[str] = mapped_column(ID)
    key_id: Mapped[str | None] = mapped_column(ID)
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batches.id"))
    position: Mapped[int] = mapped_column(default=0)  # place in its batch
    custom_id: Mapped[str | None] = mapped_column(String(512))
    model: Mapped[str] = mapped_column(ID)
    source: Mapped[str] = mapped_column(String(16))  # http | redis: whose answer is also stored for Celery
    body: Mapped[dict[str, Any]]
    info: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    seed: Mapped[int] = mapped_column(BigInteger)
    # As of the submit, for quotas and forecasts.
    estimated_tokens: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    num_samples: Mapped[int] = mapped_column(server_default=text("1"))  # of which all of those tokens are

    state: Mapped[str] = mapped_column(String(16))
    tier: Mapped[int] = mapped_column(default=2)  # `jobs.terms.Tier`, plus DELAYED before `not_before`
    priority: Mapped[int] = mapped_column(server_default=text("0"))
    not_before: Mapped[float | None]
    deadline: Mapped[float | None]
    retry: Mapped[dict[str, Any] | None]  # `jobs.terms.Retry`
    failures: Mapped[int] = mapped_column(server_default=text("0"))  # those that were tried again
    fair_tag: Mapped[float]
    prefix_group: Mapped[int] = mapped_column(BigInteger, default=0)
    audience: Mapped[int] = mapped_column(server_default=text("0"))  # `jobs.audience.Audience`

    fence: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(ID)
    error: Mapped[dict[str, Any] | None]  # {"code", "message", "param"}

    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]

    retry_of: Mapped[str | None] = mapped_column(ID)  # the job that this one is once more
    place: Mapped[int | None]  # in its batch's order of completion, from 1 (`jobs.completion_order`)
    told_at: Mapped[float | None]  # when Celery's result backend heard of the end (`jobs.teller`)

    __table_args__ = (
        _partial("ix_jobs_claim", "state = 'queued'", "model", "tier", "fair_tag", "prefix_group", "id"),
        _partial("ix_jobs_due", "state = 'queued' AND tier >= 10", "not_before"),
        _partial("ix_jobs_deadline", "deadline IS NOT NULL AND finished_at IS NULL", "deadline", "model"),
        _partial("ix_jobs_held", "worker_id IS NOT NULL", "worker_id", "id"),
        _partial("ix_jobs_placed", "place IS NOT NULL", "batch_id", "place"),
        _partial(
            "ix_jobs_unplaced",
            "place IS NULL AND finished_at IS NOT NULL AND batch_id IS NOT NULL",
            "batch_id",
            "finished_at",
            "id",
        ),
        _partial(
            "ix_jobs_untold",
            "told_at IS NULL AND finished_at IS NOT NULL AND source = 'redis'",
            "finished_at",
            "id",
        ),
        Index(None, "batch_id", "position"),
        Index(None, "batch_id", "state"),
        Index(None, "tenant", "created_at", "id"),
    )


class FairClock(Base):
    """How far the turns of one flow reach (`jobs.fair_tags`)."""

    __tablename__ = "fair_clocks"

    model: Mapped[str] = mapped_column(ID, primary_key=True)
    tier: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant: Mapped[str] = mapped_column(ID, primary_key=True)
    priority: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    turn_ends: Mapped[float]  # virtual time, in estimated tokens over shares


class IdempotencyKey(Base):
    """What a client called a submit, and the job or batch that it was accepted as."""

    __tablename__ = "idempotency_keys"

    tenant: Mapped[str] = mapped_column(ID, primary_key=True)
    key: Mapped[str] = mapped_column(ID, primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))  # SHA-256 of what was sent
    target: Mapped[str] = mapped_column(ID)
    created_at: Mapped[float]


class Result(Base):
    """What came out of a completed job; at most one, and exactly one when `completed`."""

    __tablename__ = "results"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    # [{"index", "text", "finish_reason", "stop_reason", perhaps "reasoning" with "reasoning_tokens", "logprobs"}]
    outputs: Mapped[list[dict[str, Any]]]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cached_tokens: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]


class Checkpoint(Base):
    """A part of the tokens that a job has made so far; all parts, put together, are where it goes on after an
    interruption (`jobs.checkpoints`). None is left when the job has ended."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    weights: Mapped[str] = mapped_column(String(64))  # whose tokens these are (`Checkpoint.fingerprint`)
    growth: Mapped[bytes] = mapped_column(LargeBinary)  # msgpack of `engine.request.Growth`
    created_at: Mapped[float]


class LedgerEntry(Base):
    """Tokens of one attempt. Billed rows equal results, always; wasted and cancelled work is kept apart."""

    __tablename__ = "ledger"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    tenant: Mapped[str] = mapped_column(ID)
    key_id: Mapped[str | None] = mapped_column(ID)
    model: Mapped[str] = mapped_column(ID)
    batch_id: Mapped[str | None] = mapped_column(ID)
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cached_tokens: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]

    __table_args__ = (Index(None, "batch_id", "kind"), Index(None, "tenant", "created_at"))


class Price(Base):
    """What a million tokens of a model cost from a moment on. Amounts are decimals as text, which stay exact."""

    __tablename__ = "prices"

    model: Mapped[str] = mapped_column(ID, primary_key=True)
    valid_from: Mapped[float] = mapped_column(primary_key=True)
    currency: Mapped[str] = mapped_column(String(3))
    prompt: Mapped[str] = mapped_column(String(32))
    cached_prompt: Mapped[str] = mapped_column(String(32))
    completion: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[float]


class Tally(Base):
    """A part of a tenant's sums; `jobs.tallies` says how the parts are kept and read."""

    __tablename__ = "tallies"

    tenant: Mapped[str] = mapped_column(ID, primary_key=True)
    shard: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    open_jobs: Mapped[int] = mapped_column(BigInteger)
    open_tokens: Mapped[int] = mapped_column(BigInteger)  # estimated, of open jobs
    stored_bytes: Mapped[int] = mapped_column(BigInteger)  # bodies and outputs
    day: Mapped[int]  # unix days; `day_tokens` were billed on it
    day_tokens: Mapped[int] = mapped_column(BigInteger)


class Worker(Base):
    """One Celery worker and its engine process. Its lease covers all jobs that carry its name."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    model: Mapped[str] = mapped_column(ID)
    host: Mapped[str] = mapped_column(ID)
    pid: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))
    lease_until: Mapped[float]
    started_at: Mapped[float]
    last_step_at: Mapped[float | None]  # of the engine; None before the first step
    num_running: Mapped[int] = mapped_column(default=0)
    num_waiting: Mapped[int] = mapped_column(default=0)
    tokens_per_second: Mapped[float] = mapped_column(default=0.0)
    engine_pid: Mapped[int | None]
    engine_starts: Mapped[int] = mapped_column(default=0)
    max_model_len: Mapped[int | None]  # tokens; None: its engine was never loaded
    stats: Mapped[dict[str, Any]] = mapped_column(default=dict)
    pace: Mapped[dict[str, Any] | None]  # `jobs.pace.Pace`; None: nothing measured

    __table_args__ = (Index(None, "state", "lease_until"),)


class Schedule(Base):
    """Jobs that are handed in again and again, at the times of a cron line."""

    __tablename__ = "schedules"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    tenant: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str | None] = mapped_column(ID)  # who made it, and so its batches
    name: Mapped[str] = mapped_column(ID)
    cron: Mapped[str] = mapped_column(String(100))
    time_zone: Mapped[str] = mapped_column(String(64))
    enabled: Mapped[bool]
    missed: Mapped[str] = mapped_column(String(16))  # `jobs.schedules.Missed`
    completion_window: Mapped[str | None] = mapped_column(String(16))
    num_jobs: Mapped[int]
    jobs: Mapped[list[dict[str, Any]]]  # bodies as `JobBody.stored`; empty when deleted
    info: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    revision: Mapped[int]  # grows with every change, so that a run is of what was read
    next_at: Mapped[float | None]  # None: paused, deleted, or no time is left
    created_at: Mapped[float]
    updated_at: Mapped[float]
    deleted_at: Mapped[float | None]

    __table_args__ = (
        Index(
            "uq_schedules_name",
            "tenant",
            "name",
            unique=True,
            sqlite_where=text("deleted_at IS NULL"),
            postgresql_where=text("deleted_at IS NULL"),
        ),
        _partial("ix_schedules_next_at", "next_at IS NOT NULL", "next_at"),
        Index(None, "tenant", "created_at", "id"),
    )


class ScheduleRun(Base):
    """One time that a schedule fired: its batch, or why there is none."""

    __tablename__ = "schedule_runs"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    schedule_id: Mapped[str] = mapped_column(ForeignKey("schedules.id"))
    tenant: Mapped[str] = mapped_column(ID)
    fire_time: Mapped[float]
    kind: Mapped[str] = mapped_column(String(16))  # `jobs.schedule_runs.RunKind`
    batch_id: Mapped[str | None] = mapped_column(ID)
    error: Mapped[dict[str, Any] | None]  # {"code", "message", "param"}
    created_at: Mapped[float]

    __table_args__ = (Index("uq_schedule_runs_fire_time", "schedule_id", "fire_time", unique=True),)
