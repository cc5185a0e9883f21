"""Intake: jobs enter SQL here, whichever door they came through.

Owns the choice of a model for a job that names none. Refuses to know HTTP, Redis and what happens next; what a
new row holds is `jobs.job_rows`'s. A job is accepted when its insert has committed, not before; whether it may go in
(`jobs.admission`) is asked in the same transaction. Ids are made before the transaction, which looks for them first,
so one whose commit got lost can be run again, and a Redis message that is delivered twice makes one job and counts
once. Single jobs that come at the same time share a transaction (`group_commit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from sqlalchemy import Connection, select

from jobs import tallies
from jobs.admission import Admission, Refusal, count_in
from jobs.audience import Audience
from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.database import Database, was_committed
from jobs.dialects import clock, now
from jobs.forecasts import Forecasts
from jobs.group_commit import GroupCommit
from jobs.idempotency import Submit, earlier_target, known_target
from jobs.job_rows import JobRow, insert_all, insert_new, job_row, new_id, refused_row
from jobs.models import Batch, Job, Worker
from jobs.reads import JobView, job_views
from jobs.settings import Settings
from jobs.states import LIVE_WORKER, BatchState
from jobs.tenants import Owner
from jobs.terms import ORDINARY, Terms

MAX_ID_CHARS = 255


def check_task_id(task_id: object) -> str:
    """A Celery task id that can be a job's key. Raises `BadField`."""
    if not isinstance(task_id, str) or not 1 <= len(task_id) <= MAX_ID_CHARS:
        raise BadField("task_id", f"must be a string of 1 to {MAX_ID_CHARS} characters")
    if not task_id.isprintable() or task_id != task_id.strip():
        raise BadField("task_id", "must consist of printable characters, without spaces at its ends")
    return task_id


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """One job from Redis, under its task id and the tenant that it names."""

    task_id: str
    body: JobBody
    tenant: str
    terms: Terms = ORDINARY


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch and its jobs as rows, made before the transaction that inserts them."""

    row: dict[str, Any]
    jobs: list[dict[str, Any]]
    terms: Terms

    @property
    def id(self) -> str:
        return str(self.row["id"])

    @property
    def models(self) -> frozenset[str]:
        """What its jobs are for."""
        return frozenset(str(job["model"]) for job in self.jobs)


@dataclass(frozen=True, slots=True)
class Single:
    """One job as a row, on its way in by itself."""

    row: dict[str, Any]
    terms: Terms

    @property
    def id(self) -> str:
        return str(self.row["id"])


class Intake:
    """Every `accept_…` commits or raises; bodies are what `jobs.body.parse_job` returned."""

    def __init__(self, database: Database, settings: Settings, forecasts: Forecasts | None = None) -> None:
        self._database = database
        self._settings = settings
        self._forecasts = forecasts or Forecasts(database, settings)
        self._admission = Admission(settings, self._forecasts)
        self._singles: GroupCommit[Single, JobView] = GroupCommit(self._accept_singles)

    def clock(self) -> float:
        """The database's time in unix seconds, which the moments of a submit's terms go by at every door."""
        with self._database.read() as connection:
            return clock(connection)

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

    def accepted_before(self, submit: Submit | None, owner: Owner) -> str | None:
        """What the same `submit` was accepted as, whatever has become of its deadline, its model or the tenant's room
        since. Raises `KeyReusedError`."""
        if submit is None:
            return None
        with self._database.read() as connection:
            return known_target(connection, submit, tenant=owner.tenant)

    def accept_one(
        self,
        body: JobBody,
        owner: Owner,
        submit: Submit | None = None,
        *,
        terms: Terms = ORDINARY,
        audience: Audience = Audience.NOBODY,
    ) -> str:
        """One job over HTTP; returns its id, or that of the job which the same `submit` made before. Raises
        `BadField` for a model that cannot be guessed, `QuotaExceeded`, `WindowTooTight` and `KeyReusedError`."""
        if submit is None:
            return self.accept_new(body, owner, terms=terms, audience=audience).id
        row = self._single_row(body, owner, terms, audience)

        def work(connection: Connection) -> str:
            job_id = str(row["id"])
            known = earlier_target(connection, submit, tenant=owner.tenant, target=job_id)
            if known is not None:
                return known
            if not was_committed(connection, Job.id, job_id):
                self._admission.insert_whole(connection, owner.tenant, [row], terms=terms)
            return job_id

        accepted = self._database.transact(work)
        self._forecasts.accepted([row])
        return accepted

    def accept_new(
        self,
        body: JobBody,
        owner: Owner,
        *,
        terms: Terms = ORDINARY,
        audience: Audience = Audience.NOBODY,
    ) -> JobView:
        """One job over HTTP that nobody has named; returns it as it is queued. Raises as `accept_one` does."""
        return self._singles.add(Single(self._single_row(body, owner, terms, audience), terms))

    def _single_row(self, body: JobBody, owner: Owner, terms: Terms, audience: Audience) -> JobRow:
        (body,) = self.name_models([body])
        self._forecasts.prepare(terms)
        return job_row(
            new_id("job"), body, owner, self._settings, source="http", terms=terms, audience=audience
        )

    def accept_many(
        self,
        bodies: Sequence[JobBody],
        owner: Owner,
        metadata: dict[str, str] | None = None,
        submit: Submit | None = None,
        terms: Terms = ORDINARY,
    ) -> str:
        """A batch in the given order, in one transaction: all of it or nothing. Returns the batch's id, or that of
        the batch which the same `submit` made before. Raises `BadField`, `QuotaExceeded`, `WindowTooTight` and
        `KeyReusedError`."""
        new = self.new_batch(bodies, owner, metadata, terms)

        def work(connection: Connection) -> str:
            known = earlier_target(connection, submit, tenant=owner.tenant, target=new.id)
            if known is not None:
                return known
            if not was_committed(connection, Batch.id, new.id):
                self.insert_batch(connection, new)
            return new.id

        accepted = self._database.transact(work)
        self.committed(new)
        return accepted

    def new_batch(
        self,
        bodies: Sequence[JobBody],
        owner: Owner,
        metadata: dict[str, str] | None,
        terms: Terms,
        schedule_id: str | None = None,
    ) -> NewBatch:
        """The rows of a batch, for a door whose transaction writes more than that. Raises `BadField`."""
        if not bodies:
            raise BadField("jobs", "at least one job is required")
        batch_id = new_id("batch")
        row = {
            "id": batch_id,
            "tenant": owner.tenant,
            "key_id": owner.key_id,
            "state": BatchState.IN_PROGRESS,
            "endpoint": "/v1/jobs",
            "total": len(bodies),
            "metadata": metadata or {},
            "schedule_id": schedule_id,
        }
        jobs = [
            job_row(
                new_id("job", i),
                body,
                owner,
                self._settings,
                source="http",
                terms=terms,
                batch_id=batch_id,
                position=i,
            )
            for i, body in enumerate(self.name_models(bodies))
        ]
        self._forecasts.prepare(terms)
        return NewBatch(row, jobs, terms)

    def insert_batch(self, connection: Connection, new: NewBatch) -> None:
        """Raises `BadField` for an unknown tenant, `QuotaExceeded` and `WindowTooTight`, each before anything is
        written."""
        time_now = clock(connection)
        row = new.row | {"created_at": time_now}
        self._admission.insert_whole(connection, new.row["tenant"], new.jobs, row, terms=new.terms)

    def committed(self, new: NewBatch) -> None:
        """Call it when the transaction of `insert_batch` has committed: forecasts heed the batch at once."""
        self._forecasts.accepted(new.jobs)

    def accept_messages(self, messages: Sequence[TaskMessage]) -> dict[str, Refusal]:
        """Jobs that came through Redis, under their task ids. An id that exists is passed over, whatever its
        body. Returns the ids whose tenant does not exist or has no room, with the reason; the others are
        accepted. Raises `BadField` before anything is written if an id or a model is impossible."""
        bodies = self.name_models([message.body for message in messages])
        rows: dict[str, dict[str, Any]] = {}
        for message, body in zip(messages, bodies, strict=True):
            task_id = check_task_id(message.task_id)
            owner = Owner(message.tenant, None)
            row = job_row(task_id, body, owner, self._settings, source="redis", terms=message.terms)
            rows.setdefault(task_id, row)

        def work(connection: Connection) -> dict[str, Refusal]:
            refused, fitting = self._admission.judge(connection, rows)
            # Another worker may have received the same message: only what really went in counts.
            count_in(connection, [rows[key] for key in insert_new(connection, fitting)])
            return refused

        return self._database.transact(work)

    def accept_invalid(self, task_id: str, error: dict[str, Any], tenant: str) -> bool:
        """A Redis message that is refused: nobody waits for a 400, so it becomes a failed job with `error`. False
        where the id is a job already, which stays as it is."""
        row = refused_row(check_task_id(task_id), tenant, self._settings.served_model, error)

        def work(connection: Connection) -> bool:
            num_new = len(insert_new(connection, [row]))
            tallies.add(connection, [tallies.Change(tenant, stored_bytes=tallies.size_of({}) * num_new)])
            return num_new > 0

        return self._database.transact(work)

    def _accept_singles(self, singles: Sequence[Single]) -> list[JobView | Exception]:
        """Each as it is queued, or why it is refused."""
        rows = {one.id: one.row for one in singles}
        terms = {one.id: one.terms for one in singles}
        attempts = count()

        def work(connection: Connection) -> dict[str, JobView | Refusal]:
            # Their ids are new: until an attempt may have committed, nobody knows them.
            known = {} if next(attempts) == 0 else job_views(connection, sorted(rows))
            refused, fitting = self._admission.judge(connection, rows, terms, known=known)
            stamp = insert_all(connection, fitting)
            count_in(connection, fitting)
            return {**known, **refused, **{row["id"]: stamp.view(row) for row in fitting}}

        found = self._database.transact(work)
        self._forecasts.accepted([row for key, row in rows.items() if isinstance(found[key], JobView)])
        return [found[key] for key in rows]
