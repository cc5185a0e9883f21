"""Many names in one parameter: the right rows, whatever the names are made of, and not by reading the whole table;
and connections that die unnoticed."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import Connection, bindparam, event, insert, select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from jobs.database import IDLE_SECONDS, Database, cause, commit_lazily, copy_in, is_transient
from jobs.dialects import Texts, is_among
from jobs.models import Tenant
from tests.support.databases import let_write
from tests.support.waiting import wait_until

NAMES = ["a", 'quo"te', "back\\slash", "comma,{brace}", "é😀", "NULL", "", "10", "1e3"]
NEW_TENANT = insert(Tenant).values(id="a", weight=1.0, quotas={}, created_at=0.0)
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


def killed(database: Database, backend: int) -> None:
    """PostgreSQL's process of one connection."""
    other = Database(database.url)
    with other.write() as connection:
        connection.execute(text("SELECT pg_terminate_backend(:backend)"), {"backend": backend})
    other.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_copy_whose_connection_dies_is_made_again(database: Database) -> None:
    backends: list[int] = []

    def work(connection: Connection) -> None:
        backends.append(connection.scalars(text("SELECT pg_backend_pid()")).one())
        if len(backends) == 1:
            killed(database, backends[0])
        copy_in(connection, "COPY tenants (id, weight, quotas, created_at) FROM STDIN", "a\t1\t{}\t0\n")

    database.transact(work)
    assert len(set(backends)) == 2
    with database.read() as connection:
        assert connection.scalars(select(Tenant.id).where(Tenant.id == "a")).all() == ["a"]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_sessions_that_may_only_read_are_left_when_one_must_write(
    database_url: str, database: Database
) -> None:
    let_write(database_url, False)
    with database.read() as first, database.read() as second:
        readers = {one.scalar(text("SELECT pg_backend_pid()")) for one in (first, second)}
    with pytest.raises(OperationalError, match="read-only") as caught:
        database.transact(lambda connection: connection.execute(NEW_TENANT), patience=0.1)
    assert is_transient(caught.value)
    let_write(database_url, True)
    database.transact(lambda connection: connection.execute(NEW_TENANT))
    with database.read() as first, database.read() as second:
        assert not readers & {one.scalar(text("SELECT pg_backend_pid()")) for one in (first, second)}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_copy_into_a_database_that_only_reads_is_made_when_it_writes(
    database_url: str, database: Database
) -> None:
    def work(connection: Connection) -> None:
        copy_in(connection, "COPY tenants (id, weight, quotas, created_at) FROM STDIN", "a\t1\t{}\t0\n")

    let_write(database_url, False)
    with pytest.raises(OperationalError, match="read-only"):
        database.transact(work, patience=0.1)
    let_write(database_url, True)
    database.transact(work)


def test_only_the_transaction_that_says_so_commits_lazily(database: Database) -> None:
    for lazily in (True, False):
        with database.write() as connection:
            if lazily:
                commit_lazily(connection)
            connection.execute(insert(Tenant).values(id=f"{lazily}", weight=1.0, quotas={}, created_at=0.0))
            if not database.is_sqlite:
                source = "SELECT source FROM pg_settings WHERE name = 'synchronous_commit'"
                assert (connection.scalar(text(source)) == "session") is lazily
    with database.read() as connection:
        assert set(connection.scalars(select(Tenant.id))) >= {"True", "False"}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_connection_that_died_while_nobody_used_it_is_replaced(database: Database) -> None:
    with database.read() as connection:
        own = connection.scalars(text("SELECT pg_backend_pid()")).one()
    idle_since = time.monotonic()
    killed(database, own)
    wait_until(lambda: time.monotonic() - idle_since > IDLE_SECONDS, "it has been idle")
    with database.read() as connection:
        assert connection.scalar(text("SELECT pg_backend_pid()")) != own


def test_a_log_hears_why_there_is_no_database_and_not_what_was_to_be_stored(database: Database) -> None:
    away = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    with pytest.raises(OperationalError) as caught, away.read():
        pass
    away.close()
    assert cause(caught.value).startswith("OperationalError reason=")
    assert "refused" in cause(caught.value)
    told = "INSERT INTO tenants (id, weight, quotas, created_at) VALUES ('default', 1, '{}', 1)"
    with pytest.raises(IntegrityError) as twice, database.write() as connection:
        connection.exec_driver_sql(told)
    assert cause(twice.value) == "IntegrityError"
    assert cause(OSError(28, "No space left", "a name")) == "OSError reason='No space left'"
