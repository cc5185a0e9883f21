"""Completion order: each ended job of a batch has a place, and whoever has read up to a place has missed nothing.

Owns places and the pages of results that are cut by them. The time at which a job ended is no cursor: a transaction
that began to end a job earlier may commit later, behind a reader's back. So a place is given when somebody first
asks, to jobs whose end has been committed, under the lock of the batch's row, one after the other from 1. Why
nothing is skipped: places are given in growing order by one transaction at a time, which begins after the former has
committed; so whoever sees place n sees all before it, and a job whose end is committed later gets a later place.
Ending a job costs an entry in a partial index and no lock; a place costs one update, once, and only where this order
is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, bindparam, select, update

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.models import Batch, Job
from jobs.states import TERMINAL

MAX_PAGE: Final = 1000


class Order(StrEnum):
    INPUT = "input"
    COMPLETION = "completion"

    @property
    def column(self) -> ColumnElement[Any]:
        return Job.__table__.c.position if self is Order.INPUT else Job.__table__.c.place

    @property
    def first(self) -> int:
        """The cursor before everything."""
        return -1 if self is Order.INPUT else 0


@dataclass(frozen=True, slots=True)
class Page:
    """Ended jobs behind `after`, up to and with `last`. `closed`: the batch had closed before they were looked for,
    so that with `has_more` false nothing will ever follow."""

    after: int
    last: int
    has_more: bool
    closed: bool


class CompletionOrder:
    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, batch_id: str, *, tenant: str, order: Order, after: int | None, limit: int) -> Page | None:
        """The next `limit` ended jobs of the batch in this order. In input order jobs that end later may lie before
        the cursor. None when the tenant has no such batch. Raises `BadField` for an `after` that no page has ended
        with."""
        start = order.first if after is None else max(after, order.first)
        query = select(Batch.finished_at, Batch.num_placed).where(
            Batch.id == batch_id, Batch.tenant == tenant
        )
        with self._database.read() as connection:
            batch = connection.execute(query).one_or_none()
            if batch is None:
                return None
            if order is Order.COMPLETION and start > batch.num_placed:
                raise BadField("after", "must be the X-Next of an earlier page")
            found = _behind(connection, batch_id, order, start, limit + 1)
            missing = limit + 1 - len(found)
            place = order is Order.COMPLETION and missing and bool(_unplaced(connection, batch_id, 1))
        if place:
            found = self._database.transact(lambda connection: _place(connection, batch_id, start, limit + 1))
        shown = found[:limit]
        return Page(
            after=start,
            last=shown[-1] if shown else start,
            has_more=len(found) > limit,
            closed=batch.finished_at is not None,
        )


def _behind(connection: Connection, batch_id: str, order: Order, after: int, limit: int) -> list[int]:
    column = order.column
    query = select(column).where(Job.batch_id == batch_id, column > after).order_by(column).limit(limit)
    if order is Order.INPUT:
        query = query.where(Job.state.in_(sorted(TERMINAL)))
    return list(connection.scalars(query))


def _unplaced(connection: Connection, batch_id: str, limit: int) -> list[str]:
    return list(
        connection.scalars(
            select(Job.id)
            .where(Job.batch_id == batch_id, Job.place.is_(None), Job.finished_at.is_not(None))
            .order_by(Job.finished_at, Job.id)
            .limit(limit)
        )
    )


def _place(connection: Connection, batch_id: str, after: int, limit: int) -> list[int]:
    """Give places until `limit` jobs lie behind `after`, or all that have ended have one; returns those places.

    The ended jobs are locked after their batch, against the usual order. Whoever else holds one of them while
    waiting for the batch has come with a stale outcome, which is rare: PostgreSQL then runs one of the two again.
    """
    num_placed = connection.scalars(
        select(Batch.num_placed).where(Batch.id == batch_id).with_for_update()
    ).one()
    room = limit - (num_placed - after)
    if room > 0 and (ids := _unplaced(connection, batch_id, room)):
        connection.execute(
            update(Job).where(Job.__table__.c.id == bindparam("key")).values(place=bindparam("new_place")),
            [{"key": key, "new_place": num_placed + index} for index, key in enumerate(ids, 1)],
        )
        connection.execute(update(Batch).where(Batch.id == batch_id).values(num_placed=num_placed + len(ids)))
    return _behind(connection, batch_id, Order.COMPLETION, after, limit)
