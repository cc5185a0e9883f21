"""Admission: which new jobs may go in, decided inside the transaction that inserts them.

Owns the order of the questions: does the tenant exist, is the job there already, has the tenant room
(`jobs.quotas`), can the window be met (`jobs.forecasts`); and that what goes in is added to the tenant's sums. A
batch goes in whole or not at all; of jobs that only share a transaction each is judged by itself. Refuses to know
doors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

from sqlalchemy import Connection, bindparam, insert, select

from jobs import tallies
from jobs.bad_field import BadField
from jobs.dialects import Texts, is_among
from jobs.forecasts import Forecasts, WindowTooTight
from jobs.job_rows import JobRow, insert_all, load_of
from jobs.models import Batch, Job
from jobs.quotas import QuotaExceeded, Room, open_room
from jobs.settings import Settings
from jobs.terms import Terms

Refusal: TypeAlias = BadField | QuotaExceeded | WindowTooTight
_JOB_IDS = select(Job.id).where(is_among(Job.__table__.c.id, bindparam("ids", type_=Texts)))


class Admission:
    def __init__(self, settings: Settings, forecasts: Forecasts) -> None:
        self._settings = settings
        self._forecasts = forecasts

    def insert_whole(
        self,
        connection: Connection,
        tenant: str,
        rows: Sequence[JobRow],
        batch: dict[str, Any] | None = None,
        *,
        terms: Terms,
    ) -> None:
        """All these jobs of one tenant, and the row of their `batch`, if they have one. Raises `BadField` for an
        unknown tenant, `QuotaExceeded` and `WindowTooTight`, each before anything is written."""
        load = load_of(rows)
        open_room(connection, tenant, self._settings).take(load)
        self._forecasts.check(connection, rows, terms)
        if batch is not None:
            connection.execute(insert(Batch), [batch])
        insert_all(connection, rows)
        tallies.add(connection, [load.change(tenant)])

    def judge(
        self,
        connection: Connection,
        rows: Mapping[str, JobRow],
        terms: Mapping[str, Terms] = MappingProxyType({}),
        *,
        known: Collection[str] | None = None,
    ) -> tuple[dict[str, Refusal], list[JobRow]]:
        """Those that are refused, by id, and those that may go in; what is there already is neither. `terms`: of
        those whose window must be met. `known`: ids that are there; None: not looked for yet."""
        refused: dict[str, Refusal] = {}
        rooms = self._rooms(connection, {str(row["tenant"]) for row in rows.values()})
        known = set(connection.scalars(_JOB_IDS, {"ids": sorted(rows)})) if known is None else known
        fitting: list[JobRow] = []
        for job_id, row in rows.items():
            if job_id in known:
                continue
            room, load = rooms[row["tenant"]], load_of([row])
            if isinstance(room, BadField):
                refused[job_id] = room
                continue
            try:
                room.check(load)
                if job_id in terms:
                    self._forecasts.check(connection, [row], terms[job_id])
            except (QuotaExceeded, WindowTooTight) as error:
                refused[job_id] = error
            else:
                room.take(load)
                fitting.append(row)
        return refused, fitting

    def _rooms(self, connection: Connection, tenants: Iterable[str]) -> dict[str, Room | BadField]:
        """Of a tenant that does not exist, the error that says so."""
        rooms: dict[str, Room | BadField] = {}
        for tenant in sorted(tenants):
            try:
                rooms[tenant] = open_room(connection, tenant, self._settings)
            except BadField as error:
                rooms[tenant] = error
        return rooms


def count_in(connection: Connection, inserted: Sequence[JobRow]) -> None:
    """Add jobs that were judged and went in to their tenants' sums."""
    tallies.add(connection, [load_of([row]).change(row["tenant"]) for row in inserted])
