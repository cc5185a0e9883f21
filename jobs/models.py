"""The tables: batches, jobs, results, ledger, workers. The same on SQLite and PostgreSQL.

Owns columns, keys and indexes; statements live beside the part of the service that needs them. Times are unix
seconds on the database's clock (`database.now`). Prompts and outputs are JSON text, so that NUL and other
characters that a text column refuses can be stored on both databases.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, MetaData, String, text
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
    type_annotation_map = {float: Double, dict[str, Any]: JSON(none_as_null=True), list[dict[str, Any]]: JSON}  # noqa: RUF012


class Batch(Base):
    """Jobs handed in together. Counts are never stored: they are counted from the jobs."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    tenant: Mapped[str] = mapped_column(ID, default="default")
    state: Mapped[str] = mapped_column(String(16))
    endpoint: Mapped[str] = mapped_column(String(64))
    total: Mapped[int]
    info: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    created_at: Mapped[float]
    cancelling_at: Mapped[float | None]
    finished_at: Mapped[float | None]

    __table_args__ = (Index(None, "tenant", "created_at", "id"),)


class Job(Base):
    """One generation: the unit of state, retry, cancel and usage.

    `body` is the validated `jobs.body.JobBody` as JSON. `tier`, `fair_tag`, `prefix_group`, `id` are
    the order of work. `fence` grows at every claim; `crashes` counts engine deaths it was running in.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    tenant: Mapped[str] = mapped_column(ID, default="default")
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batches.id"))
    position: Mapped[int] = mapped_column(default=0)  # place in its batch
    custom_id: Mapped[str | None] = mapped_column(String(512))
    model: Mapped[str] = mapped_column(ID)
    source: Mapped[str] = mapped_column(String(16))  # http | redis: whose answer is also stored for Celery
    body: Mapped[dict[str, Any]]
    info: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    seed: Mapped[int] = mapped_column(BigInteger)

    state: Mapped[str] = mapped_column(String(16))
    tier: Mapped[int] = mapped_column(default=2)  # 0 interactive, 1 urgent, 2 normal, 3 background
    fair_tag: Mapped[float]
    prefix_group: Mapped[int] = mapped_column(BigInteger, default=0)

    fence: Mapped[int] = mapped_column(default=0)
    crashes: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(ID)
    error: Mapped[dict[str, Any] | None]  # {"code", "message", "param"}

    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]

    __table_args__ = (
        Index(
            "ix_jobs_claim",
            "model",
            "tier",
            "fair_tag",
            "prefix_group",
            "id",
            sqlite_where=text("state = 'queued'"),
            postgresql_where=text("state = 'queued'"),
        ),
        Index(
            "ix_jobs_held",
            "worker_id",
            "id",
            sqlite_where=text("worker_id IS NOT NULL"),
            postgresql_where=text("worker_id IS NOT NULL"),
        ),
        Index(None, "batch_id", "position"),
        Index(None, "batch_id", "state"),
        Index(None, "tenant", "created_at", "id"),
    )


class Result(Base):
    """What came out of a completed job; at most one, and exactly one when `completed`."""

    __tablename__ = "results"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    outputs: Mapped[list[dict[str, Any]]]  # [{"index", "text", "finish_reason", "stop_reason"}]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cached_tokens: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]


class LedgerEntry(Base):
    """Tokens of one attempt. Billed rows equal results, always; wasted and cancelled work is kept apart."""

    __tablename__ = "ledger"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    fence: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    tenant: Mapped[str] = mapped_column(ID)
    model: Mapped[str] = mapped_column(ID)
    batch_id: Mapped[str | None] = mapped_column(ID)
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    cached_tokens: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]

    __table_args__ = (Index(None, "batch_id", "kind"), Index(None, "tenant", "created_at"))


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
    max_model_len: Mapped[int | None]
    stats: Mapped[dict[str, Any]] = mapped_column(default=dict)

    __table_args__ = (Index(None, "state", "lease_until"),)
