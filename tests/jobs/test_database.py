"""Many names in one parameter: the right rows, whatever the names are made of, and not by reading the whole table;
and connections that die unnoticed."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import bindparam, event, insert, select, text

from jobs.database import IDLE_SECONDS, Database, Texts, is_among
from jobs.models import Tenant
from tests.support.waiting import wait_until

NAMES = ["a", 'quo"te', "back\\slash", "comma,{brace}", "é😀", "NULL", "", "10", "1e3"]
AMONG = select(Tenant.id).where(is_among(Tenant.__table__.c.id, bindparam("ids", type_=Texts)))


def fill(database: Database, names: list[str]) -> None:
    rows = [{"id": name, "weight": 1.0, "quotas": {}, "created_at": 0.0} for name in names]
    with database.write() as connection:
        connection.execute(insert(Tenant), rows)


def test_those_that_are_named_are_found(database: Database) -> None:
    fill(database, NAMES)
    with database.read() as connection:
        for asked in ([], NAMES[:1], NAMES[::2], NAMES, [*NAMES, "nobody"] * 300):
            found = connection.scalars(AMONG, {"ids": asked}).all()
            assert sorted(found) == sorted(set(asked) - {"nobody"})


def test_they_are_looked_up_and_not_searched_for(database: Database) -> None:
    def explain(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> tuple[str, Any]:
        query_plan = " QUERY PLAN" if database.is_sqlite else ""
        return f"EXPLAIN{query_plan} {statement}", parameters

    fill(database, [f"tenant-{index}" for index in range(2_000)])
    with database.write() as connection:
        connection.exec_driver_sql("ANALYZE tenants")
        locked = AMONG.order_by(Tenant.id).with_for_update()
        event.listen(database.engine, "before_cursor_execute", explain, retval=True)
        try:
            lines = connection.execute(locked, {"ids": ["tenant-7"]}).cursor.fetchall()
        finally:
            event.remove(database.engine, "before_cursor_execute", explain)
    plan = " ".join(str(line[-1]) for line in lines)
    assert ("SEARCH tenants" if database.is_sqlite else "Index Cond") in plan


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_connection_that_died_while_nobody_used_it_is_replaced(database: Database) -> None:
    with database.read() as connection:
        own = connection.scalar(text("SELECT pg_backend_pid()"))
    idle_since = time.monotonic()
    other = Database(database.url)
    with other.write() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:own)"), {"own": own})
    other.close()
    wait_until(lambda: time.monotonic() - idle_since > IDLE_SECONDS, "it has been idle")
    with database.read() as connection:
        assert connection.scalar(text("SELECT pg_backend_pid()")) != own
