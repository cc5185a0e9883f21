"""What tests of the job layer share: a migrated database of each kind, our Celery app, and a way to hand jobs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery

from jobs.body import parse_job
from jobs.broker import make_app
from jobs.database import Database
from jobs.intake import Intake
from jobs.settings import Settings
from jobs.tenants import OPERATOR
from tests.support.bare_celery import leave_backend

Submit = Callable[[int], list[str]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, model="tiny", lease_seconds=4.0, renew_seconds=1.0)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def app(redis_url: str, tmp_path: Path) -> Iterator[Celery]:
    """Ours, on a broker of the test's own."""
    app = make_app(Settings(data_dir=tmp_path, model="tiny", redis_url=redis_url))
    yield app
    leave_backend(app)
    app.close()


@pytest.fixture
def submit(database: Database, settings: Settings) -> Submit:
    """Queue so many jobs over the HTTP door; their ids, sorted."""
    intake = Intake(database, settings)

    def submit(count: int) -> list[str]:
        return sorted(
            intake.accept_one(parse_job({"prompt": f"job {i}"}, settings), OPERATOR) for i in range(count)
        )

    return submit
