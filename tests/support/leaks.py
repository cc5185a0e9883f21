"""What a test run may leave behind: nothing. Processes are found by a mark in their environment, and the servers keep
their files in a folder of that name.

Every process that descends from the run inherits the mark, also one whose parent is dead: looking for children
alone would miss exactly the engine process that outlived its worker. A worker of pytest-xdist puts its own name
behind the mark of the run, so that it finds what is its own while the others go on, and the run finds everything.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import redis

MARK = "NIGHTPRESS_TEST_RUN"


def mark_this_run() -> None:
    """`RUN/` of a whole run, `RUN/gw0/` of its worker, which has inherited the former."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    inherited = os.environ.get(MARK) if worker else None
    os.environ[MARK] = f"{inherited}{worker}/" if inherited else f"{uuid.uuid4().hex[:16]}/"


def run_folder() -> Path:
    """For what must not lie under pytest's own folders, whose paths are too long for a unix socket."""
    return Path(tempfile.gettempdir(), f"nightpress-tests-{os.environ[MARK]}")


def marked_processes() -> list[psutil.Process]:
    """Living descendants of this run, without this process itself."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(MARK, "").startswith(os.environ[MARK])
            if marked and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile, or it is another user's
    return found


def processes_left(patience: float = 5.0) -> list[str]:
    """One line per process that is still there after `patience` seconds; those are killed."""
    deadline = time.monotonic() + patience
    while (left := marked_processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    lines = []
    for process in left:
        try:
            lines.append(f"{process.pid} {' '.join(process.cmdline())}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return lines


def files_left() -> list[str]:
    """What is still in the folder of this run; it is removed."""
    folder = run_folder()
    left = sorted(str(path) for path in folder.glob("**/*") if not path.is_dir())
    shutil.rmtree(folder, ignore_errors=True)
    return left


def immortal_keys(client: redis.Redis) -> list[str]:
    """Keys that would stay in Redis for ever. Celery's queues and bindings are bounded by design, and exempt."""
    exempt = (b"_kombu.binding.", b"unacked")
    return [
        key.decode(errors="replace")
        for key in client.scan_iter(count=1000)
        if not key.startswith(exempt) and client.type(key) != b"list" and client.ttl(key) == -1
    ]
