"""Stores: an empty database of each kind for a benchmark, on disk and with every commit synced to it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Final

from tests.support.servers import PostgresServer

Stop = Callable[[], None]


def sqlite() -> tuple[str, Stop]:
    folder = tempfile.TemporaryDirectory(prefix="nightpress-bench-")
    return f"sqlite:///{folder.name}/nightpress.sqlite3", folder.cleanup


def postgresql() -> tuple[str, Stop]:
    server = PostgresServer(durable=True)
    return server.url(), server.stop


STORES: Final[dict[str, Callable[[], tuple[str, Stop]]]] = {"sqlite": sqlite, "postgresql": postgresql}
