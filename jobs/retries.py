"""Retries: jobs that did not work out are handed in once more, as new jobs.

Owns what may be retried and the one transaction that does it. An ended job never changes, so a retry is a new job
with `retry_of`, and a retried batch a new batch of those jobs alone, in their old order. It is a submit like any
other: it needs room in the quotas, may carry an `Idempotency-Key`, and is all or nothing. Refuses to know HTTP.
"""

from __future__ import annotations

from array import array
from typing import Any, Final

from sqlalchemy import Connection, Row, String, cast, func, insert, select

from jobs import tallies
from jobs.bad_field import BadField
from jobs.database import Database, was_committed
from jobs.dialects import clock, portions
from jobs.idempotency import Submit, earlier_target
from jobs.job_rows import again_row, insert_all, new_id
from jobs.models import Batch, Job
from jobs.quotas import Load, open_room
from jobs.settings import Settings
from jobs.states import BatchState, JobState
from jobs.tenants import Owner

RETRIABLE: Final = (JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED)
USUAL: Final = frozenset({JobState.FAILED, JobState.EXPIRED})
# Redis messages that were refused became failed jobs without a body: there is nothing to run.
_EMPTY: Final = "{}"


class NothingToRetry(Exception):
    """No job of the wanted states is there."""

    code = "nothing_to_retry"

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


def parse_states(value: object) -> frozenset[JobState]:
    """Of a body's `states`, a list of some of `RETRIABLE`. Raises `BadField`."""
    if not isinstance(value, list) or not value or not all(one in RETRIABLE for one in value):
        raise BadField("states", f"must be a list of some of {', '.join(RETRIABLE)}")
    return frozenset(JobState(one) for one in value)


class Retries:
    """Both calls return the new id, or what the same `submit` made before, and the models that have new jobs. None
    when the tenant has no such thing. They raise `NothingToRetry`, `QuotaExceeded` and `KeyReusedError`."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def retry_job(
        self, job_id: str, owner: Owner, *, states: frozenset[JobState] = USUAL, submit: Submit | None = None
    ) -> tuple[str, frozenset[str]] | None:
        """As a job without a batch."""
        new = new_id("job")

        def work(connection: Connection) -> tuple[str, frozenset[str]] | None:
            query = select(*Job.__table__.columns).where(Job.id == job_id, Job.tenant == owner.tenant)
            old = connection.execute(query).one_or_none()
            if old is None:
                return None
            known = earlier_target(connection, submit, tenant=owner.tenant, target=new)
            if known is not None:
                return known, frozenset()
            if was_committed(connection, Job.id, new):
                return new, frozenset([old.model])
            if old.state not in states or old.body == {}:
                wanted = " or ".join(sorted(states))
                raise NothingToRetry(
                    f"this job is {old.state}, not {wanted}"
                    if old.state not in states
                    else "this job was refused when it came, so there is nothing to run"
                )
            load = Load(1, old.estimated_tokens, tallies.size_of(old.body))
            open_room(connection, owner.tenant, self._settings).take(load)
            later = clock(connection) - _submitted_at(connection, old)
            insert_all(connection, [again_row(old, new, owner, later=later)])
            tallies.add(connection, [load.change(owner.tenant)])
            return new, frozenset([old.model])

        return self._database.transact(work)

    def retry_batch(
        self,
        batch_id: str,
        owner: Owner,
        *,
        states: frozenset[JobState] = USUAL,
        submit: Submit | None = None,
    ) -> tuple[str, frozenset[str]] | None:
        """As a batch of those jobs that are in one of `states` now; the old batch may still be running."""
        new = new_id("batch")

        def work(connection: Connection) -> tuple[str, frozenset[str]] | None:
            old = connection.execute(
                select(*Batch.__table__.columns).where(Batch.id == batch_id, Batch.tenant == owner.tenant)
            ).one_or_none()
            if old is None:
                return None
            known = earlier_target(connection, submit, tenant=owner.tenant, target=new)
            if known is not None:
                return known, frozenset()
            if was_committed(connection, Batch.id, new):
                return new, frozenset(connection.scalars(select(Job.model).where(Job.batch_id == new)))
            return new, self._copy(connection, old, new, owner, states)

        return self._database.transact(work)

    def _copy(
        self, connection: Connection, old: Row[Any], new: str, owner: Owner, states: frozenset[JobState]
    ) -> frozenset[str]:
        # One statement says which: others may end while this runs, and whoever looked twice would see them once.
        positions, load = _wanted(connection, old.id, states)
        if load.jobs == 0:
            raise NothingToRetry(f"no job of this batch is {' or '.join(sorted(states))}")
        open_room(connection, owner.tenant, self._settings).take(load)
        time_now = clock(connection)
        later = time_now - old.created_at
        connection.execute(
            insert(Batch).values(
                id=new,
                tenant=owner.tenant,
                key_id=owner.key_id,
                state=BatchState.IN_PROGRESS,
                endpoint=old.endpoint,
                total=load.jobs,
                info=old.metadata,
                created_at=time_now,
                retry_of=old.id,
                # Those of a file have an output file as well, which needs no line of the input any more.
                input_file_id=old.input_file_id,
                num_inserted=load.jobs,
                completion_window=old.completion_window,
                expires_at=None if old.expires_at is None else old.expires_at + later,
                output_expires_seconds=old.output_expires_seconds,
                model=old.model,
                in_progress_at=time_now,
            )
        )
        models: set[str] = set()
        for some in portions(range(load.jobs)):
            rows = connection.execute(
                select(*Job.__table__.columns)
                .where(Job.batch_id == old.id, Job.position.in_([positions[i] for i in some]))
                .order_by(Job.position)
            ).all()
            models.update(row.model for row in rows)
            insert_all(
                connection,
                [
                    again_row(row, new_id("job", i), owner, batch_id=new, position=i, later=later)
                    for i, row in zip(some, rows, strict=True)
                ],
            )
        tallies.add(connection, [load.change(owner.tenant)])
        return frozenset(models)


def _submitted_at(connection: Connection, job: Row[Any]) -> float:
    """Lines of a file become jobs some time after their batch was handed in."""
    handed_in = connection.scalars(select(Batch.created_at).where(Batch.id == job.batch_id)).one_or_none()
    return float(job.created_at if handed_in is None else handed_in)


def _wanted(connection: Connection, batch_id: str, states: frozenset[JobState]) -> tuple[array[int], Load]:
    """Positions of the jobs to copy, ascending, and what they add to their tenant."""
    body = cast(Job.body, String)
    rows = connection.execute(
        # It is ASCII, so characters are bytes.
        select(Job.position, Job.estimated_tokens, func.length(body).label("size"))
        .where(Job.batch_id == batch_id, Job.state.in_(sorted(states)), body != _EMPTY)
        .order_by(Job.position),
        execution_options={"yield_per": 1000},
    )
    positions = array("q")
    tokens = stored = 0
    for row in rows:
        positions.append(row.position)
        tokens += row.estimated_tokens
        stored += row.size
    return positions, Load(len(positions), tokens, stored)
