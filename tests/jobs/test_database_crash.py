"""A PostgreSQL that crashes for real, and takes along what was committed without waiting for the disk."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from jobs import batch_intake
from jobs.batch_intake import job_id_of
from jobs.clerk import Clerk
from jobs.database import Database
from jobs.settings import Settings
from migrations.schema import upgrade
from tests.support.batch_lines import Bench, run
from tests.support.invariants import check_invariants
from tests.support.servers import PostgresServer, libpq


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """One that writes nothing out that nobody waits for."""
    server = PostgresServer()
    with psycopg.connect(libpq(server.url()), autocommit=True) as connection:
        connection.execute("ALTER DATABASE postgres SET synchronous_commit = on")
        connection.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
        connection.execute("ALTER SYSTEM SET bgwriter_lru_maxpages = 0")
        connection.execute("SELECT pg_reload_conf()")
    yield server
    server.stop()


@pytest.fixture
def database(server: PostgresServer) -> Iterator[Database]:
    upgrade(server.url())
    database = Database(server.url())
    yield database
    database.close()


def test_chunks_that_a_crash_took_along_are_inserted_again(
    server: PostgresServer, database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_intake, "CHUNK", 2)
    bench = Bench(database, settings)
    batch_id = bench.create(9)
    seen: list[int] = []

    def announce(model: str) -> None:
        seen.append(bench.batch(batch_id).num_inserted)
        if len(seen) == 3:
            server.crash()

    bench.clerk = Clerk(database, settings, announce)
    bench.work()
    assert seen[2] == 6
    assert seen[3] <= 6, "a chunk, at least, was lost"
    ids = [job_id_of(batch_id, i) for i in range(9)]
    assert [job.id for job in bench.jobs(batch_id)] == ids
    run(database)
    bench.work()
    assert len(bench.lines(bench.batch(batch_id).output_file_id)) == 9
    check_invariants(database, ids)
