"""Intake: jobs enter SQL here, whichever door they came through.

Owns ids, seeds, the order keys of new rows, and the choice of a model for a job that names none. Refuses to
know HTTP, Redis and what happens next. A job is accepted when its insert has committed, not before. Ids are
made before the transaction and every insert passes over ids that exist, so a transaction whose commit got
lost can be run again, and a Redis message that is delivered twice makes one job.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Table, select
from sqlalchemy.dialects import postgresql, sqlite

from engine.request import derive_seed
from jobs.body import BadField, JobBody
from jobs.database import Database, now
from jobs.models import Batch, Job, Worker
from jobs.settings import Settings
from jobs.states import LIVE_WORKER, TERMINAL, BatchState, JobState

MAX_ID_CHARS = 255
TIER_NORMAL = 2
FAIR_BUCKET_SECONDS = 10  # jobs of one bucket are ordered by prefix group
PREFIX_CHARS = 256
_ROWS_PER_STATEMENT = 1000


def new_id(kind: str, position: int = 0) -> str:
    """`job_` and 32 hex digits that sort by time, then by position: 48 bits ms, 32 position, 48 random."""
    return f"{kind}_{time.time_ns() // 1_000_000:012x}{position:08x}{secrets.token_hex(6)}"


def prefix_group(model: str, opening: str) -> int:
    """The same 63-bit number for jobs that start with the same text, on every machine and in every run."""
    return derive_seed("prefix", model, opening[:PREFIX_CHARS])


def check_task_id(task_id: object) -> str:
    """A Celery task id that can be a job's key. Raises `BadField`."""
    if not isinstance(task_id, str) or not 1 <= len(task_id) <= MAX_ID_CHARS:
        raise BadField("task_id", f"must be a string of 1 to {MAX_ID_CHARS} characters")
    if not task_id.isprintable() or task_id != task_id.strip():
        raise BadField("task_id", "must consist of printable characters, without spaces at its ends")
    return task_id


class Intake:
    """Every `accept_…` commits or raises; bodies are what `jobs.body.parse_job` returned."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    # --- model ----------------------------------------------------------------------------------------------

    def default_model(self) -> str | None:
        """The model of a job that names none: the configured one, else the only one of all live workers."""
        if self._settings.served_model:
            return self._settings.served_model
        query = (
            select(Worker.model)
            .distinct()
            .where(Worker.state.in_(LIVE_WORKER), Worker.lease_until > now())
            .limit(2)
        )
        with self._database.read() as connection:
            models = list(connection.scalars(query))
        return models[0] if len(models) == 1 else None

    def name_models(self, bodies: Sequence[JobBody]) -> list[JobBody]:
        """The same bodies, each with a model. Raises `BadField`; its param is `jobs[i].model` if there are
        several bodies."""
        if all(body.model is not None for body in bodies):
            return list(bodies)
        default = self.default_model()
        named: list[JobBody] = []
        for index, body in enumerate(bodies):
            if body.model is None:
                if default is None:
                    error = BadField(
                        "model",
                        "is required, because there is not exactly one model that is served",
                        "missing_required_parameter",
                    )
                    raise error if len(bodies) == 1 else error.inside(f"jobs[{index}]")
                body = body.model_copy(update={"model": default})
            named.append(body)
        return named

    # --- doors ----------------------------------------------------------------------------------------------

    def accept_one(self, body: JobBody) -> str:
        """One job over HTTP; returns its id. Raises `BadField` for a model that cannot be guessed."""
        (body,) = self.name_models([body])
        row = _row(new_id("job"), body, source="http")
        self._database.transact(lambda connection: _insert_jobs(connection, [row]))
        return str(row["id"])

    def accept_many(self, bodies: Sequence[JobBody], metadata: dict[str, str] | None = None) -> str:
        """A batch in the given order, in one transaction: all of it or nothing. Returns the batch's id."""
        if not bodies:
            raise BadField("jobs", "at least one job is required")
        batch = {
            "id": new_id("batch"),
            "tenant": "default",
            "state": BatchState.IN_PROGRESS,
            "endpoint": "/v1/jobs",
            "total": len(bodies),
            "metadata": metadata or {},
        }
        rows = [
            _row(new_id("job", i), body, source="http", batch_id=batch["id"], position=i)
            for i, body in enumerate(self.name_models(bodies))
        ]

        def work(connection: Connection) -> None:
            _insert(connection, Batch.__table__, [batch | {"created_at": connection.scalar(select(now()))}])
            _insert_jobs(connection, rows)

        self._database.transact(work)
        return str(batch["id"])

    def accept_messages(self, messages: Sequence[tuple[str, JobBody]]) -> None:
        """Jobs that came through Redis, under their task ids. An id that exists is passed over, whatever its
        body. Raises `BadField` before anything is written if an id or a model is impossible."""
        bodies = self.name_models([body for _, body in messages])
        rows = [
            _row(check_task_id(task_id), body, source="redis")
            for (task_id, _), body in zip(messages, bodies, strict=True)
        ]
        self._database.transact(lambda connection: _insert_jobs(connection, rows))

    def accept_invalid(self, task_id: str, error: BadField) -> None:
        """A Redis message whose body is refused: nobody waits for a 400, so it becomes a failed job."""
        row = {
            "id": check_task_id(task_id),
            "tenant": "default",
            "batch_id": None,
            "position": 0,
            "custom_id": None,
            "model": self._settings.served_model,
            "source": "redis",
            "body": {},
            "metadata": {},
            "seed": derive_seed("job", task_id),
            "state": JobState.FAILED,
            "tier": TIER_NORMAL,
            "prefix_group": 0,
            "error": error.as_error(),
        }
        self._database.transact(lambda connection: _insert_jobs(connection, [row]))


def _row(
    job_id: str, body: JobBody, *, source: str, batch_id: object = None, position: int = 0
) -> dict[str, Any]:
    if body.model is None:
        raise ValueError("a job needs a model before it can be stored")
    return {
        "id": job_id,
        "tenant": "default",
        "batch_id": batch_id,
        "position": position,
        "custom_id": body.custom_id,
        "model": body.model,
        "source": source,
        "body": body.stored(),
        "metadata": body.metadata or {},
        "seed": derive_seed("job", job_id) if body.seed is None else body.seed,
        "state": JobState.QUEUED,
        "tier": TIER_NORMAL,
        "prefix_group": prefix_group(body.model, body.opening),
    }


def _insert_jobs(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    # Read once, so that all jobs of a batch have one time, and the database's, not this machine's.
    time_now = connection.scalars(select(now())).one()
    clock = {
        "created_at": time_now,
        "fair_tag": float(time_now // FAIR_BUCKET_SECONDS * FAIR_BUCKET_SECONDS),
        "fence": 0,
        "crashes": 0,
    }
    ended = {"finished_at": time_now}
    open_ = {"finished_at": None}
    # In id order like every statement that touches several jobs, so that two inserts cannot deadlock.
    _insert(
        connection,
        Job.__table__,
        [
            row | clock | (ended if row["state"] in TERMINAL else open_)
            for row in sorted(rows, key=lambda row: str(row["id"]))
        ],
    )


def _insert(connection: Connection, table: Any, rows: Sequence[dict[str, Any]]) -> None:
    """INSERT … ON CONFLICT DO NOTHING, spelled for this connection's database."""
    assert isinstance(table, Table)
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(table).on_conflict_do_nothing(index_elements=["id"])
    for start in range(0, len(rows), _ROWS_PER_STATEMENT):
        connection.execute(statement, rows[start : start + _ROWS_PER_STATEMENT])
