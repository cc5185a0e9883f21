"""Supervisor: embedded mode. One command runs a private broker, the database, the API and one worker.

Owns the children: their start, their restart and their end. They live in sessions of their own, so that
Ctrl-C reaches only this process, which then stops them in order: the worker first, with its grace period, then
the API, then the broker. Should this process be killed, the kernel kills them (`jobs.parent_death`), for which
everything is started from the main thread.
"""

from __future__ import annotations

import fcntl
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import FrameType
from typing import TextIO

from sqlalchemy.exc import SQLAlchemyError

from jobs.database import Database, reason_of
from jobs.parent_death import tied_to_parent
from jobs.python_process import command_of, environment_of
from jobs.reads import Reads
from jobs.settings import REQUEST_GRACE_SECONDS, Settings
from jobs.valkey import PrivateValkey
from migrations import upgrade

LOOK_SECONDS = 0.1  # how often the children are looked at
API_START_SECONDS = 60.0
STOP_MARGIN_SECONDS = 10.0  # beyond its grace period, before a child is killed
MAX_BACKOFF_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a child that lived so long starts its backoff anew
MAX_FAILED_STARTS = 3  # of a worker that was never ready: its model cannot be served


class StartError(RuntimeError):
    """Embedded mode cannot start; the message says why."""


class Child:
    """One subcommand of ours as a process, started again with growing pauses when it dies."""

    def __init__(self, *arguments: str) -> None:
        self.name = arguments[0]
        self._arguments = list(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause = 0.5
        self._again = 0.0  # when it may be started again

    def start(self) -> None:
        self._process = subprocess.Popen(
            command_of("api.cli", *self._arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment_of(),
            start_new_session=True,
            preexec_fn=tied_to_parent(signal.SIGKILL),
        )
        self._started = time.monotonic()

    def replace(self, option: str, value: str) -> None:
        """Give `option` another value from the next start on."""
        self._arguments[self._arguments.index(option) + 1] = value

    @property
    def returncode(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def pid(self) -> int:
        """0 while it is not running."""
        return 0 if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def revive(self) -> bool:
        """Start it again when it is dead and its pause is over. True when this call noticed the death."""
        if self.alive:
            return False
        if self._process is not None:
            if time.monotonic() - self._started > STEADY_SECONDS:
                self._pause = 0.5
            self._again = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, MAX_BACKOFF_SECONDS)
            _say(f"{self.name} ended with status {self._process.returncode}, starting it again", sys.stderr)
            self._process = None
            return True
        if time.monotonic() >= self._again:
            self.start()
        return False

    def stop(self, patience: float, hurry: threading.Event) -> None:
        """SIGTERM, then SIGKILL when `patience` seconds have passed or `hurry` is set."""
        if self._process is None:
            return
        deadline = time.monotonic() + patience
        self._process.terminate()
        while self._process.poll() is None:
            if time.monotonic() > deadline or hurry.wait(LOOK_SECONDS / 2):
                self._process.kill()
                self._process.wait()


class Supervisor:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.data_dir.absolute()
        self._url_file = self._folder / "url"
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._database: Database | None = None
        self._reads: Reads | None = None
        self._valkey = PrivateValkey(settings.valkey_socket) if settings.embedded_broker else None
        # The API is told the model too: it answers before the worker has a row, which could tell it.
        common = ("--data-dir", str(self._folder), "--model", settings.model)
        self._api = Child(
            *("api", *common, "--host", settings.host, "--port", str(settings.port)),
            *("--url-file", str(self._url_file)),
        )
        self._worker = Child("worker", *common)

    def run(self) -> int:
        """Run until SIGINT or SIGTERM; a second one does not wait for running jobs. Returns the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self._folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return self._fail(f"`nightpress up` is already running in {self._folder}")
            try:
                self._start()
                self._watch()
            except (StartError, RuntimeError, OSError) as error:
                return self._fail(str(error))
            except SQLAlchemyError as error:
                return self._fail(f"the database cannot be used: {reason_of(error)}")
            finally:
                self._stop()
        return 0

    def _start(self) -> None:
        self._url_file.unlink(missing_ok=True)
        if self._valkey is not None:
            self._valkey.start()
        upgrade(self._settings.database)
        self._database = Database(self._settings.database, pool_size=1)
        self._reads = Reads(self._database)
        self._worker.start()  # first, because loading the model takes longest
        self._api.start()
        deadline = time.monotonic() + API_START_SECONDS
        while not self._url_file.exists() and not self._stopping.wait(LOOK_SECONDS / 5):
            if not self._api.alive:
                raise StartError("the API did not start")
            if time.monotonic() > deadline:
                raise StartError(f"the API did not start within {API_START_SECONDS:g} s")
        if not self._stopping.is_set():
            url = self._url_file.read_text().strip()
            self._api.replace("--port", url.rpartition(":")[2])  # started again, it keeps its address
            _say(f"listening on {url}")

    def _watch(self) -> None:
        ready = False
        deaths = 0
        while not self._stopping.wait(LOOK_SECONDS):
            if not ready and self._is_ready():
                ready = True
                _say("ready")
            if self._worker.returncode == 0 and not ready:
                raise StartError("the worker left before it was ready")
            if self._worker.revive():
                deaths += 1
                if not ready and deaths >= MAX_FAILED_STARTS:
                    raise StartError("the worker cannot start; its reason is above")
            self._api.revive()
            if self._valkey is not None and not self._valkey.alive:
                _say("the private broker ended, starting it again", sys.stderr)
                self._valkey.stop()
                self._valkey.start()

    def _is_ready(self) -> bool:
        """Our own worker is loaded (a row that a killed one left behind does not count), and the API answers. It need
        not be ready: what waits for another model, which was served here before, is not for this worker."""
        try:
            if self._reads is None or not self._reads.is_worker_ready(socket.gethostname(), self._worker.pid):
                return False
            with _direct.open(f"{self._url_file.read_text().strip()}/health", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (OSError, SQLAlchemyError):
            return False

    def _stop(self) -> None:
        self._worker.stop(self._settings.grace_seconds + STOP_MARGIN_SECONDS, self._hurry)
        self._api.stop(REQUEST_GRACE_SECONDS + STOP_MARGIN_SECONDS, self._hurry)
        if self._valkey is not None:
            self._valkey.stop()
        if self._database is not None:
            self._database.close()
        self._url_file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    def _fail(self, reason: str) -> int:
        _say(f"nightpress: {reason}", sys.stderr)
        return 1


# Straight to the loopback address: a proxy that the environment names has no business here.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _say(line: str, stream: TextIO | None = None) -> None:
    stream = stream or sys.stdout
    stream.write(line + "\n")
    stream.flush()
