"""Stores: an empty database of each kind for a benchmark, on disk and with every commit synced to it.

Owns the run of the job layer's benchmarks too, which measure the same on each store and end with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from tests.support import leaks
from tests.support.servers import PostgresServer

Stop = Callable[[], None]
Start = Callable[[], tuple[str, Stop]]
Figures = dict[str, Any]


def sqlite() -> tuple[str, Stop]:
    folder = tempfile.TemporaryDirectory(prefix="nightpress-bench-")
    return f"sqlite:///{folder.name}/nightpress.sqlite3", folder.cleanup


def postgresql() -> tuple[str, Stop]:
    server = PostgresServer(durable=True)
    return server.url(), server.stop


STORES: Final[dict[str, Start]] = {"sqlite": sqlite, "postgresql": postgresql}


@contextmanager
def started(start: Start) -> Iterator[tuple[str, Path]]:
    """The url of an empty database, and an empty folder beside it."""
    url, stop = start()
    try:
        with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
            yield url, Path(folder)
    finally:
        stop()


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace, Start], Figures],
    passes: Callable[[Figures], bool],
    targets: str,
) -> int:
    """Measure on every store; the exit code says whether all of them pass."""
    options = parser.parse_args()
    leaks.mark_this_run()
    load = psutil.getloadavg()[1]
    figures: Figures = {}
    for name, start in STORES.items():
        figures[name] = measure(options, start)
        print(f"{name}: {figures[name]} (targets: {targets})", flush=True)
    passed = all(passes(one) for one in figures.values())
    figures |= vars(options) | {
        "passed": passed,
        "load_before": load,
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(figures))
    return 0 if passed else 1
