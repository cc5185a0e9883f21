"""Schedules: what is to be handed in again and again. Made, changed, listed and deleted here.

Owns the schedules table. When one fires and what that makes is `jobs.schedule_runs`'s. The next time is stored
beside each schedule, so that looking for due ones is one probe of an index; it is computed anew whenever the cron
line, the time zone or the pause changes, from the database's clock. A deleted schedule keeps its row without its
jobs, because runs and batches name it; its name is free again. Jobs of a schedule count towards its tenant's stored
bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from jobs import tallies
from jobs.bad_field import BadField
from jobs.cron_line import CronLine
from jobs.database import Database
from jobs.dialects import clock, now
from jobs.job_rows import new_id
from jobs.keyset import page
from jobs.models import Schedule
from jobs.quotas import Load, open_room
from jobs.schedule_body import Missed, stored_jobs
from jobs.settings import Settings
from jobs.tenants import Owner

T = TypeVar("T")
COLUMNS: Final = tuple(column for column in Schedule.__table__.columns if column.name != "jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleView:
    """A schedule without its jobs. Times in unix seconds."""

    id: str
    name: str
    cron: str
    time_zone: str
    enabled: bool
    missed: Missed
    completion_window: str | None
    num_jobs: int
    metadata: dict[str, str]
    next_at: float | None
    created_at: float
    updated_at: float
    deleted_at: float | None


class Schedules:
    """Each call is one transaction; `fields` are what `jobs.schedule_body` returned."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def create(self, fields: dict[str, Any], owner: Owner) -> ScheduleView:
        """Raises `BadField` for a name that is taken, and `QuotaExceeded`."""
        jobs = stored_jobs(fields["jobs"])
        schedule_id = new_id("schedule")

        def work(connection: Connection) -> ScheduleView:
            if (made := find(connection, schedule_id, tenant=owner.tenant)) is not None:
                return view(made)  # this very transaction was committed before its connection was lost
            self._store(connection, owner.tenant, tallies.size_of(jobs))
            time_now = clock(connection)
            row = fields | {
                "id": schedule_id,
                "tenant": owner.tenant,
                "key_id": owner.key_id,
                "jobs": jobs,
                "num_jobs": len(jobs),
                "revision": 0,
                "next_at": _next(fields, time_now),
                "created_at": time_now,
                "updated_at": time_now,
            }
            connection.execute(insert(Schedule), [row])
            return view(find(connection, schedule_id, tenant=owner.tenant))

        return self._named_once(work)

    def change(self, schedule_id: str, fields: dict[str, Any], *, tenant: str) -> ScheduleView | None:
        """None when there is no such schedule. Raises `BadField` and `QuotaExceeded`."""

        def work(connection: Connection) -> ScheduleView | None:
            row = find(connection, schedule_id, tenant=tenant, lock=True)
            if row is None or row.deleted_at is not None:
                return None
            values = dict(fields)
            time_now = clock(connection)
            before = {name: getattr(row, name) for name in ("cron", "time_zone", "enabled")}
            timing = {name: values.get(name, known) for name, known in before.items()}
            if timing != before:
                CronLine.of(timing["cron"], timing["time_zone"])
                # What is due stays so, unless this pauses it.
                is_due = row.next_at is not None and row.next_at <= time_now
                values["next_at"] = row.next_at if is_due and timing["enabled"] else _next(timing, time_now)
            if "jobs" in values:
                values["jobs"] = stored_jobs(values["jobs"])
                values["num_jobs"] = len(values["jobs"])
                stored = tallies.size_of(_jobs(connection, schedule_id))
                self._store(connection, tenant, tallies.size_of(values["jobs"]) - stored)
            connection.execute(
                update(Schedule)
                .where(Schedule.id == schedule_id)
                .values(
                    {getattr(Schedule, _ATTRIBUTES.get(name, name)): value for name, value in values.items()}
                )
                .values(updated_at=time_now, revision=Schedule.revision + 1)
            )
            return view(find(connection, schedule_id, tenant=tenant))

        return self._named_once(work)

    def delete(self, schedule_id: str, *, tenant: str) -> ScheduleView | None:
        """None when there is no such schedule. What it has started goes on."""

        def work(connection: Connection) -> ScheduleView | None:
            row = find(connection, schedule_id, tenant=tenant, lock=True)
            if row is None or row.deleted_at is not None:
                return None if row is None else view(row)
            freed = tallies.size_of(_jobs(connection, schedule_id)) - tallies.size_of([])
            connection.execute(
                update(Schedule)
                .where(Schedule.id == schedule_id)
                .values(
                    jobs=[], enabled=False, next_at=None, deleted_at=now(), revision=Schedule.revision + 1
                )
            )
            tallies.add(connection, [tallies.Change(tenant, stored_bytes=-freed)])
            return view(find(connection, schedule_id, tenant=tenant))

        return self._database.transact(work)

    # --- reads ----------------------------------------------------------------------------------------------

    def get(self, schedule_id: str, *, tenant: str) -> ScheduleView | None:
        """Also one that has been deleted."""
        with self._database.read() as connection:
            row = find(connection, schedule_id, tenant=tenant)
        return None if row is None else view(row)

    def jobs(self, schedule_id: str, *, tenant: str) -> list[dict[str, Any]]:
        """The bodies of a schedule that exists."""
        query = select(Schedule.jobs).where(Schedule.id == schedule_id, Schedule.tenant == tenant)
        with self._database.read() as connection:
            return list(connection.scalars(query).one())

    def page(
        self, *, tenant: str, name: str | None = None, after: str | None = None, limit: int = 20
    ) -> tuple[list[ScheduleView], bool]:
        """A page of schedules that are not deleted, newest first, and whether more follow. `after` is the last id of
        the page before. Raises `BadField` when there is no such schedule."""
        query = select(*COLUMNS).where(Schedule.tenant == tenant, Schedule.deleted_at.is_(None))
        if name is not None:
            query = query.where(Schedule.name == name)
        with self._database.read() as connection:
            rows, more = page(
                connection, query, Schedule, tenant=tenant, noun="schedule", after=after, limit=limit
            )
        return [view(row) for row in rows], more

    # --- transactions -----------------------------------------------------------------------------------------

    def _store(self, connection: Connection, tenant: str, num_bytes: int) -> None:
        if num_bytes > 0:
            load = Load(jobs=0, tokens=0, stored_bytes=num_bytes)
            open_room(connection, tenant, self._settings).take(load)
        tallies.add(connection, [tallies.Change(tenant, stored_bytes=num_bytes)])

    def _named_once(self, work: Callable[[Connection], T]) -> T:
        try:
            return self._database.transact(work)
        except IntegrityError as error:
            if "uq_schedules_name" not in str(error.orig) and "schedules.name" not in str(error.orig):
                raise
            raise BadField("name", "is taken by another schedule", "name_taken") from None


_ATTRIBUTES: Final = {"metadata": "info"}  # columns under another name in `models`


def find(connection: Connection, schedule_id: str, *, tenant: str, lock: bool = False) -> Row[Any] | None:
    """The row without its jobs, also of a deleted schedule."""
    query = select(*COLUMNS).where(Schedule.id == schedule_id, Schedule.tenant == tenant)
    return connection.execute(query.with_for_update() if lock else query).one_or_none()


def view(row: Row[Any] | None) -> ScheduleView:
    assert row is not None
    return ScheduleView(
        id=row.id,
        name=row.name,
        cron=row.cron,
        time_zone=row.time_zone,
        enabled=row.enabled,
        missed=Missed(row.missed),
        completion_window=row.completion_window,
        num_jobs=row.num_jobs,
        metadata=row.metadata,
        next_at=row.next_at,
        created_at=row.created_at,
        updated_at=row.updated_at,
        deleted_at=row.deleted_at,
    )


def _jobs(connection: Connection, schedule_id: str) -> list[dict[str, Any]]:
    return list(connection.scalars(select(Schedule.jobs).where(Schedule.id == schedule_id)).one())


def _next(fields: Any, moment: float) -> float | None:
    """When it fires after `moment`; None while it is paused."""
    return (
        CronLine(fields["cron"], ZoneInfo(fields["time_zone"])).next_after(moment)
        if fields["enabled"]
        else None
    )
