"""ScheduleRuns: what happens when a schedule's time has come, once per time, and the record of it.

Owns the schedule_runs table and the transaction that fires: the schedule's next time, the run, the batch and its
jobs are one commit. Whoever moves `next_at` from the value that was read is the one that fires; the unique key of
(schedule, time) stands behind that. A run whose jobs are refused, by a quota, by a window that cannot be met or for
want of a model, is recorded with the reason and not tried again: the next time is the next try, or `start` by hand.
A time that is more than `LATE_SECONDS` old was missed, and the schedule's policy says what follows. Of several
times that have passed one fires at most. Refuses to know threads (`jobs.timekeeper`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, Row, func, select, tuple_, update

from jobs.bad_field import BadField
from jobs.completion_window import terms_of_window
from jobs.cron_line import CronLine
from jobs.database import Database, was_committed
from jobs.dialects import clock, insert_into, now
from jobs.forecasts import WindowTooTight
from jobs.idempotency import Submit, earlier_target
from jobs.intake import Intake, NewBatch
from jobs.job_rows import new_id
from jobs.models import Schedule, ScheduleRun
from jobs.quotas import QuotaExceeded
from jobs.schedule_body import Missed, bodies_of
from jobs.schedules import COLUMNS, find
from jobs.tenants import Owner
from jobs.terms import ORDINARY

LATE_SECONDS: Final = 300.0  # a run that is later than this was missed
PAGE: Final = 100
_TICK_SECONDS: Final = 1e-5  # what a unix time of today can tell apart, and more


class RunKind(StrEnum):
    SCHEDULED = "scheduled"
    CATCH_UP = "catch_up"  # for times that were missed
    MANUAL = "manual"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """`error`: why there is no batch. Times in unix seconds."""

    id: str
    schedule_id: str
    kind: RunKind
    fire_time: float
    batch_id: str | None
    error: dict[str, Any] | None
    created_at: float


@dataclass(frozen=True, slots=True)
class Started:
    """A run and, when it has a batch that this call made, that batch."""

    run: RunView
    batch: NewBatch | None


class ScheduleRuns:
    def __init__(self, database: Database, intake: Intake) -> None:
        self._database = database
        self._intake = intake

    # --- by the clock -----------------------------------------------------------------------------------------

    def due(self, after: tuple[float, str] = (0.0, "")) -> list[tuple[float, str]]:
        """(time, id) of up to `PAGE` schedules whose time has come, in this order, beyond `after`."""
        place = tuple_(Schedule.next_at, Schedule.id)
        query = select(Schedule.next_at, Schedule.id).order_by(Schedule.next_at, Schedule.id).limit(PAGE)
        with self._database.read() as connection:
            time_now = clock(connection)
            rows = connection.execute(
                query.where(
                    Schedule.next_at.is_not(None), Schedule.next_at <= time_now, place > tuple_(*after)
                )
            ).all()
        return [(row.next_at, row.id) for row in rows]

    def fire(self, schedule_id: str) -> Started | None:
        """Do what is due now; None when nothing is, or when another process has done it."""
        with self._database.read() as connection:
            row = self._read(connection, Schedule.id == schedule_id, Schedule.next_at <= now())
            time_now = clock(connection)
        if row is None:
            return None
        line = CronLine(row.cron, ZoneInfo(row.time_zone))
        missed = time_now - row.next_at > LATE_SECONDS
        next_at = line.next_after(max(time_now, row.next_at))
        move = (
            update(Schedule)
            .where(Schedule.id == row.id, Schedule.revision == row.revision, Schedule.next_at == row.next_at)
            .values(next_at=next_at)
        )
        if missed and row.missed == Missed.SKIP:
            self._database.transact(lambda connection: connection.execute(move))
            return None
        kind = RunKind.CATCH_UP if missed else RunKind.SCHEDULED
        batch, refusal = self._prepared(row, Owner(row.tenant, row.key_id), time_now)
        run = _run_row(row, kind, row.next_at)

        def work(connection: Connection) -> Started | None:
            if connection.execute(move).rowcount == 0:
                return self._known(connection, run["id"], batch)
            error = refusal
            new = insert_into(connection, ScheduleRun).values(**run, created_at=now())
            new = new.on_conflict_do_nothing(index_elements=["schedule_id", "fire_time"])
            if connection.scalars(new.returning(ScheduleRun.id)).first() is None:
                return None
            if batch is not None:
                try:
                    self._intake.insert_batch(connection, batch)
                except (BadField, QuotaExceeded, WindowTooTight) as refused:
                    error = refused.as_error()
            result = {"error": error} if error else {"batch_id": batch.id if batch else None}
            connection.execute(update(ScheduleRun).where(ScheduleRun.id == run["id"]).values(**result))
            return self._known(connection, run["id"], batch)

        return self._committed(self._database.transact(work))

    # --- by hand ----------------------------------------------------------------------------------------------

    def start(self, schedule_id: str, owner: Owner, submit: Submit | None = None) -> Started | None:
        """Hand its jobs in now, also while it is paused; None when there is no such schedule. The same `submit`
        starts one run. Raises `BadField`, `QuotaExceeded`, `WindowTooTight` and `KeyReusedError`, and then records
        nothing."""
        if (known := self._intake.accepted_before(submit, owner)) is not None:
            with self._database.read() as connection:
                return Started(_view(_find(connection, known)), None)
        with self._database.read() as connection:
            row = self._read(connection, Schedule.id == schedule_id, Schedule.tenant == owner.tenant)
            time_now = clock(connection)
        if row is None:
            return None
        batch = self._batch(row, owner, time_now)
        run = _run_row(row, RunKind.MANUAL, time_now)

        def work(connection: Connection) -> Started:
            known = earlier_target(connection, submit, tenant=owner.tenant, target=run["id"])
            if known is not None:
                return Started(_view(_find(connection, known)), None)
            if not was_committed(connection, ScheduleRun.id, run["id"]):
                find(connection, schedule_id, tenant=owner.tenant, lock=True)  # one run after the other
                self._intake.insert_batch(connection, batch)
                moment = {"fire_time": max(time_now, _after_the_last(connection, schedule_id))}
                new = insert_into(connection, ScheduleRun).values(
                    **run | moment, batch_id=batch.id, created_at=now()
                )
                connection.execute(new)
            return Started(_view(_find(connection, run["id"])), batch)

        return self._committed(self._database.transact(work))

    # --- reads ------------------------------------------------------------------------------------------------

    def page(
        self, schedule_id: str, *, tenant: str, after: str | None = None, limit: int = 20
    ) -> tuple[list[RunView], bool]:
        """A page of runs, latest first, and whether more follow. `after` is the last id of the page before. Raises
        `BadField` when there is no such run."""
        query = (
            select(*ScheduleRun.__table__.columns)
            .where(ScheduleRun.schedule_id == schedule_id, ScheduleRun.tenant == tenant)
            .order_by(ScheduleRun.fire_time.desc())
            .limit(limit + 1)
        )
        with self._database.read() as connection:
            if after is not None:
                edge = _find(connection, after)
                if edge is None or (edge.schedule_id, edge.tenant) != (schedule_id, tenant):
                    raise BadField("after", "there is no such run")
                query = query.where(ScheduleRun.fire_time < edge.fire_time)
            rows = connection.execute(query).all()
        return [_view(row) for row in rows[:limit]], len(rows) > limit

    # --- parts ------------------------------------------------------------------------------------------------

    def _read(self, connection: Connection, *conditions: Any) -> Row[Any] | None:
        columns: list[Any] = [*COLUMNS, Schedule.jobs]
        return connection.execute(
            select(*columns).where(Schedule.deleted_at.is_(None), *conditions)
        ).one_or_none()

    def _batch(self, row: Row[Any], owner: Owner, time_now: float) -> NewBatch:
        window = row.completion_window
        terms = ORDINARY if window is None else terms_of_window(window, submitted_at=time_now)
        return self._intake.new_batch(bodies_of(row.jobs), owner, row.metadata, terms, row.id)

    def _prepared(
        self, row: Row[Any], owner: Owner, time_now: float
    ) -> tuple[NewBatch | None, dict[str, Any] | None]:
        try:
            return self._batch(row, owner, time_now), None
        except BadField as refused:  # a model that nobody serves by now
            return None, refused.as_error()

    def _known(self, connection: Connection, run_id: str, batch: NewBatch | None) -> Started | None:
        """Of this very call: None when another process was first."""
        row = _find(connection, run_id)
        return None if row is None else Started(_view(row), batch if row.batch_id else None)

    def _committed(self, started: Started | None) -> Started | None:
        if started is not None and started.batch is not None:
            self._intake.committed(started.batch)
        return started


def _run_row(schedule: Row[Any], kind: RunKind, fire_time: float) -> dict[str, Any]:
    """Made before its transaction, so that this can be run again after a commit that got lost."""
    return {
        "id": new_id("run"),
        "schedule_id": schedule.id,
        "tenant": schedule.tenant,
        "fire_time": fire_time,
        "kind": kind,
    }


def _after_the_last(connection: Connection, schedule_id: str) -> float:
    """A moment behind all runs of a schedule: two by hand may come within one tick of the database's clock."""
    last = connection.scalar(
        select(func.max(ScheduleRun.fire_time)).where(ScheduleRun.schedule_id == schedule_id)
    )
    return 0.0 if last is None else last + _TICK_SECONDS


def _find(connection: Connection, run_id: str) -> Row[Any] | None:
    query = select(*ScheduleRun.__table__.columns).where(ScheduleRun.id == run_id)
    return connection.execute(query).one_or_none()


def _view(row: Row[Any] | None) -> RunView:
    assert row is not None
    return RunView(
        id=row.id,
        schedule_id=row.schedule_id,
        kind=RunKind(row.kind),
        fire_time=row.fire_time,
        batch_id=row.batch_id,
        error=row.error,
        created_at=row.created_at,
    )
