"""Which ended jobs Celery has been told of comes to a database that was in use: of those from before, all."""

from __future__ import annotations

from sqlalchemy import Connection, text

from jobs.database import Database
from migrations import upgrade
from tests.migrations.test_tenants_and_keys import insert_job


def fill(connection: Connection) -> None:
    """Jobs as 0008 has them: through Redis one that has ended and one that is open, over HTTP one that has ended."""
    for job_id, source, state, finished_at in (
        ("ended", "redis", "failed", 7.5),
        ("open", "redis", "queued", None),
        ("http", "http", "completed", 8.5),
    ):
        end = {"state": state, "finished_at": finished_at}
        insert_job(connection, id=job_id, position=0, source=source, **end)


def test_who_had_ended_before_is_not_told_of_again(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0008")
    database = Database(empty_database_url)
    database.transact(fill)
    upgrade(empty_database_url)
    with database.read() as connection:
        found = connection.execute(text("SELECT id, told_at FROM jobs")).all()
    assert {row.id: row.told_at for row in found} == {"ended": 7.5, "open": None, "http": None}
    database.close()
