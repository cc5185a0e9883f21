"""Keyset: a page of a tenant's rows by time of creation, the same for every list.

Owns the order (created_at, id) and its edge, so that page 1,000 costs what page 1 costs and a row that is inserted
meanwhile shifts nothing. What is asked for and what becomes of the rows is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from sqlalchemy import Connection, Row, Select, select, tuple_

from jobs.bad_field import BadField

Direction: TypeAlias = Literal["asc", "desc"]  # of time: oldest or newest first


def page(
    connection: Connection,
    query: Select[Any],
    table: Any,
    *,
    tenant: str,
    noun: str,
    after: str | None,
    limit: int,
    direction: Direction = "desc",
) -> tuple[Sequence[Row[Any]], bool]:
    """At most `limit` rows of `query`, and whether more follow. `table`: by whose `created_at` and `id` they are
    ordered; `after`: the last id of the page before, whether the query still finds it or not. Raises `BadField` when
    the tenant has no such `noun`."""
    columns = (table.created_at, table.id)
    place = tuple_(*columns)
    descending = direction == "desc"
    order = [column.desc() for column in columns] if descending else columns
    query = query.order_by(*order).limit(limit + 1)
    if after is not None:
        found = connection.execute(
            select(*columns).where(table.id == after, table.tenant == tenant)
        ).one_or_none()
        if found is None:
            raise BadField("after", f"there is no such {noun}")
        edge = tuple_(*found)
        query = query.where(place < edge if descending else place > edge)
    rows = connection.execute(query).all()
    return rows[:limit], len(rows) > limit
