"""Fixtures for all tests: real servers, fresh databases, and the check that nothing is left behind.

`NIGHTPRESS_TEST_REDIS_URL` and `NIGHTPRESS_TEST_DATABASE_URL` name servers to use instead of our own; the Redis
database named there is flushed before every test. Every other `NIGHTPRESS_` variable of the shell is
forgotten, so that a developer's settings cannot decide whether tests pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.support import leaks
from tests.support.databases import KINDS, Databases
from tests.support.servers import PostgresServer, ValkeyServer

_SHELL = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("NIGHTPRESS_")}
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any test module
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported; see jobs/engine_process.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

leaks.mark_this_run()


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    left = leaks.processes_left()
    assert not left, "processes outlived the tests:\n" + "\n".join(left)


@pytest.fixture(scope="session")
def given_redis_url() -> str | None:
    """A Redis that the developer wants the tests to use."""
    return _SHELL.get("NIGHTPRESS_TEST_REDIS_URL") or None


@pytest.fixture(scope="session")
def redis_server_url(given_redis_url: str | None) -> Iterator[str]:
    """A real server, one for the session. Flush it if you use it without `redis_url`."""
    if given_redis_url:
        yield given_redis_url
        return
    server = ValkeyServer()
    yield server.url
    server.stop()


@pytest.fixture
def redis_url(redis_server_url: str) -> Iterator[str]:
    """An empty Redis. Afterwards no key without an expiry may be left in it."""
    with redis.Redis.from_url(redis_server_url) as client:
        client.flushdb()
        yield redis_server_url
        left = leaks.immortal_keys(client)
        assert not left, f"Redis keys that never expire: {left}"


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """Makes databases; the PostgreSQL server starts with the first use of this fixture."""
    url = _SHELL.get("NIGHTPRESS_TEST_DATABASE_URL")
    server = None if url else PostgresServer()
    made = Databases(tmp_path_factory.mktemp("databases"), url or server.url())  # type: ignore[union-attr]
    yield made
    made.close()
    if server is not None:
        server.stop()


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, databases: Databases) -> Iterator[str]:
    """SQLAlchemy URL of a fresh, migrated database: the test runs once on each kind."""
    with databases.fresh(request.param) as url:
        yield url


@pytest.fixture(params=KINDS)
def empty_database_url(request: pytest.FixtureRequest, databases: Databases) -> Iterator[str]:
    """Like `database_url`, but without any table."""
    with databases.fresh(request.param, migrated=False) as url:
        yield url
