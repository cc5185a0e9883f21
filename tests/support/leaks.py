"""What a test run may leave behind: nothing. Processes are found by a mark in their environment.

Every process that descends from the run inherits the mark, also one whose parent is dead: looking for children
alone would miss exactly the engine process that outlived its worker.
"""

from __future__ import annotations

import os
import time
import uuid

import psutil
import redis

MARK = "NIGHTPRESS_TEST_RUN"


def mark_this_run() -> None:
    os.environ[MARK] = uuid.uuid4().hex


def marked_processes() -> list[psutil.Process]:
    """Living descendants of this run, without this process itself."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(MARK) == os.environ[MARK]
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


def immortal_keys(client: redis.Redis) -> list[str]:
    """Keys that would stay in Redis for ever. Celery's queues and bindings are bounded by design, and exempt."""
    exempt = (b"_kombu.binding.", b"unacked")
    return [
        key.decode(errors="replace")
        for key in client.scan_iter(count=1000)
        if not key.startswith(exempt) and client.type(key) != b"list" and client.ttl(key) == -1
    ]
