"""What the API's tests share: the application on a migrated database of each kind, and a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.database import Database
from jobs.settings import Settings
from tests.support.clients import local_client
from tests.support.databases import Databases

LIMITS: dict[str, Any] = {"max_body_bytes": 10_000, "max_array_bytes": 200_000, "max_array_jobs": 50}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, model="tiny", **LIMITS)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def woken() -> list[str]:
    """What workers were told."""
    return []


@pytest.fixture
def client(database: Database, settings: Settings, woken: list[str]) -> Iterator[TestClient]:
    app = create_app(settings, database, woken.append)
    with local_client(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def front(databases: Databases) -> Iterator[TestClient]:
    """One client for a module's refusals, which never reach the database."""
    with databases.fresh("sqlite") as url:
        database = Database(url)
        with local_client(create_app(Settings(model="tiny", **LIMITS), database)) as client:
            yield client
        database.close()
