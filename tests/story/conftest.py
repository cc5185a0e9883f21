"""The press of a module of stories: real processes, once on SQLite and once on PostgreSQL, both with Valkey."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.databases import KINDS, Databases
from tests.support.press import Press
from tests.support.servers import ValkeyServer
from tests.support.tiny import write_tiny_llama


@pytest.fixture(scope="module", params=KINDS)
def press(
    request: pytest.FixtureRequest,
    databases: Databases,
    tmp_path_factory: pytest.TempPathFactory,
    given_redis_url: str | None,
) -> Iterator[Press]:
    folder = tmp_path_factory.mktemp("press")
    model = write_tiny_llama(folder / "model", max_position=8192)
    valkey = None if given_redis_url else ValkeyServer()
    failed_before = request.session.testsfailed
    with databases.fresh(request.param) as database_url:
        redis_url = given_redis_url or valkey.url  # type: ignore[union-attr]
        running = Press(folder, database_url=database_url, redis_url=redis_url, model=model)
        try:
            running.open()
            yield running
        finally:
            try:
                running.close()
            finally:
                if request.session.testsfailed > failed_before:
                    print("\n".join(process.tail() for process in running.processes))
                if valkey is not None:
                    valkey.stop()
