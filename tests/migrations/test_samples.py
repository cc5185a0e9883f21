"""How many samples a job asks for comes to a database that was in use: jobs from before count as one, as they did."""

from __future__ import annotations

from sqlalchemy import text

from jobs.database import Database
from migrations import downgrade, upgrade
from tests.migrations.test_told_jobs import fill


def test_jobs_from_before_stay_and_count_as_one(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0010")
    database = Database(empty_database_url)
    database.transact(fill)
    upgrade(empty_database_url)
    with database.read() as connection:
        assert set(connection.execute(text("SELECT id, num_samples FROM jobs")).all()) == {
            ("ended", 1),
            ("open", 1),
            ("http", 1),
        }
    downgrade(empty_database_url, "0010")
    with database.read() as connection:
        assert connection.scalar(text("SELECT count(*) FROM jobs")) == 3
    database.close()
