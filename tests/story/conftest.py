"""The press of all stories: real processes, once on SQLite and once on PostgreSQL, both with Valkey.

One press serves the stories of a kind one after the other, in any order: each says how many workers it wants, and
ends with no open job. A story that fails takes its press along, so that the next one does not inherit what it left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.databases import Databases
from tests.support.press import Press
from tests.support.servers import ValkeyServer
from tests.support.tiny import write_tiny_llama


class Running:
    """The press that runs, opened when it is first asked for and again after `close`."""

    def __init__(self, opened: Callable[[], AbstractContextManager[Press]]) -> None:
        self._opened = opened
        self._open = ExitStack()
        self._press: Press | None = None

    def press(self) -> Press:
        if self._press is None:
            self._press = self._open.enter_context(self._opened())
        return self._press

    def close(self) -> None:
        self._press = None
        self._open.close()


@contextmanager
def opened_press(
    folder: Path, database_url: str, redis_url: str | None, model: Path, **settings: str
) -> Iterator[Press]:
    """A press with a Valkey of its own, unless `redis_url` names one. `settings`: of the environment."""
    with ExitStack() as stack:
        valkey = None
        if redis_url is None:
            valkey = ValkeyServer()
            stack.callback(valkey.stop)
            redis_url = valkey.url
        press = Press(folder, database_url=database_url, redis_url=redis_url, model=model)
        press.redis_server = valkey
        press.environment |= settings
        stack.callback(press.close)
        press.open()
        yield press


# On both databases; `make test` is content with PostgreSQL, because SQLite is what tests/api/test_up.py runs on.
@pytest.fixture(scope="package", params=[pytest.param("sqlite", marks=pytest.mark.long), "postgresql"])
def running(
    request: pytest.FixtureRequest,
    databases: Databases,
    tmp_path_factory: pytest.TempPathFactory,
    given_redis_url: str | None,
) -> Iterator[Running]:
    @contextmanager
    def opened() -> Iterator[Press]:
        folder = tmp_path_factory.mktemp("press")
        model = write_tiny_llama(folder / "model", max_position=8192)
        with (
            databases.fresh(request.param) as database_url,
            opened_press(folder, database_url, given_redis_url, model) as press,
        ):
            yield press

    running = Running(opened)
    yield running
    running.close()


@pytest.fixture
def press(request: pytest.FixtureRequest, running: Running) -> Iterator[Press]:
    press = running.press()
    press.begin()
    failed_before = request.session.testsfailed
    yield press
    if request.session.testsfailed > failed_before:
        print("\n".join(process.tail() for process in press.processes))
        running.close()
