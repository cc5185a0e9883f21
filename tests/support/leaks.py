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
_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
_MEMORY_BYTES = 8 << 30  # free, for the largest test's database and the rest of the machine


def mark_this_run() -> None:
    """`RUN/` of a whole run, `RUN/gw0/` of its worker, which has inherited the former."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    inherited = os.environ.get(MARK) if worker else None
    os.environ[MARK] = f"{inherited}{worker}/" if inherited else f"{uuid.uuid4().hex[:16]}/"


def run_folder() -> Path:
    """For what must not lie under pytest's own folders, whose paths are too long for a unix socket."""
    return _folder(Path(tempfile.gettempdir()))


def _folder(root: Path) -> Path:
    return root / f"nightpress-tests-{os.environ[MARK]}"


def memory_folder() -> Path:
    """The same in memory, where there is room for it: ext4 takes a quarter of a second for a few hundred new files
    where as many were deleted just before."""
    free = shutil.disk_usage(_MEMORY).free if os.access(_MEMORY, os.W_OK) else 0
    return _folder(_MEMORY) if free >= _MEMORY_BYTES else run_folder()


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
    """What is still in the folders of this run; they are removed."""
    left: list[str] = []
    for folder in (run_folder(), _folder(_MEMORY)):
        left += sorted(str(path) for path in folder.glob("**/*") if not path.is_dir())
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
