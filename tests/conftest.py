"""Fixtures for all tests: real servers, fresh databases, and the check that nothing is left behind.

`NIGHTPRESS_TEST_REDIS_URL` and `NIGHTPRESS_TEST_DATABASE_URL` name servers to use instead of our own; the Redis
database named there is flushed before every test. Every other `NIGHTPRESS_` variable of the shell is
forgotten, so that a developer's settings cannot decide whether tests pass.

With `-n` every worker of pytest-xdist is a run of its own, with its own servers and its own check; the process that
deals the tests out looks once more when its workers are gone, for they may have been killed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.support import leaks
from tests.support.databases import KINDS, Databases
from tests.support.servers import PostgresServer, ValkeyServer

REDIS_URL, DATABASE_URL = "NIGHTPRESS_TEST_REDIS_URL", "NIGHTPRESS_TEST_DATABASE_URL"
_KEPT = {REDIS_URL, DATABASE_URL, leaks.MARK}  # also for the workers of pytest-xdist, which inherit them
for _name in [name for name in os.environ if name.startswith("NIGHTPRESS_") and name not in _KEPT]:
    del os.environ[_name]
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any test module
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported; see jobs/engine_process.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

leaks.mark_this_run()


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(REDIS_URL) and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError(
            f"{REDIS_URL} is flushed before every test: run in one process, with -n 0 (make test PROCESSES=0)"
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """For `-n` alone; whoever names a way to distribute the tests gets that."""
    from tests.support.workers import ByModule

    return ByModule(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After pytest-randomly, which comes first of all."""
    if hasattr(config, "workerinput"):
        from tests.support.workers import longest_first

        longest_first(items)


def pytest_collection_finish() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules:
        from tests.support.interpreter import spare_repeats

        spare_repeats()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In the process that deals out: its workers are gone by now, and so must be all they had started."""
    if not getattr(session.config.option, "numprocesses", None):
        return
    if left := leaks.processes_left() + leaks.files_left():
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        terminal = session.config.get_terminal_writer()
        terminal.line("\nleft behind by the workers:\n" + "\n".join(left), red=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    left = leaks.processes_left() + leaks.files_left()
    assert not left, "left behind by the tests:\n" + "\n".join(left)


@pytest.fixture(scope="session")
def given_redis_url() -> str | None:
    """A Redis that the developer wants the tests to use."""
    return os.environ.get(REDIS_URL) or None


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
    url = os.environ.get(DATABASE_URL)
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
