"""Migrations: the tables are what the models say, in both directions, on both databases, at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from jobs.database import Database
from jobs.models import Base
from migrations import downgrade, upgrade
from migrations.schema import misfit
from tests.support.tree import ROOT


def things(engine: Engine) -> set[str]:
    """Every table, trigger and function of ours."""
    query = (
        "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
        if engine.dialect.name == "sqlite"
        else "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal "
        "UNION SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace "
        "UNION SELECT indexname FROM pg_indexes WHERE schemaname = 'public'"
    )
    with engine.connect() as connection:
        return set(inspect(connection).get_table_names()) | set(connection.scalars(text(query)))


def test_the_newest_shape_is_what_the_models_say(empty_database_url: str) -> None:
    upgrade(empty_database_url)
    database = Database(empty_database_url)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    # Index conditions are not compared above.
    query = (
        "SELECT sql FROM sqlite_master WHERE type = 'index' AND name = :name"
        if database.is_sqlite
        else "SELECT indexdef FROM pg_indexes WHERE indexname = :name"
    )
    with database.read() as connection:
        for name, condition in {"ix_jobs_claim": "queued", "ix_jobs_held": "worker_id IS NOT NULL"}.items():
            assert condition in str(connection.scalar(text(query), {"name": name}))
    database.close()


def test_the_way_back_leaves_nothing(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    before = things(database.engine)
    upgrade(empty_database_url)
    assert len(things(database.engine)) > len(before) + 10
    downgrade(empty_database_url)
    assert things(database.engine) == before
    upgrade(empty_database_url)
    assert misfit(database) is None
    database.close()


def test_a_repeated_upgrade_changes_nothing(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    assert misfit(database) is not None
    upgrade(empty_database_url)
    made = things(database.engine)
    with database.write() as connection:
        connection.execute(
            text(
                "INSERT INTO batches (id, tenant, state, endpoint, total, metadata, created_at) "
                "VALUES ('b', 'default', 'in_progress', '/', 1, '{}', 1)"
            )
        )
    upgrade(empty_database_url)
    assert things(database.engine) == made
    with database.read() as connection:
        assert connection.scalar(text("SELECT count(*) FROM batches")) == 1
    database.close()


def test_processes_that_start_together_migrate_once(empty_database_url: str) -> None:
    """Each is ready before the word is given to all: what takes long is to load the program."""
    program = (
        "from migrations import upgrade; print('ready', flush=True); input(); "
        f"upgrade({empty_database_url!r})"
    )
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    database = Database(empty_database_url)
    assert misfit(database) is None
    database.close()


def test_a_migration_that_fails_leaves_the_old_shape(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    with database.write() as connection:  # in the way of the third table
        connection.execute(text("CREATE TABLE results (x INTEGER)"))
    before = things(database.engine)
    with pytest.raises(Exception, match="results"):
        upgrade(empty_database_url)
    assert things(database.engine) == before
    database.close()
