"""EngineProcess: the worker's end of one engine process, from its start to its death.

Owns the subprocess, its two pipes and the ids that are in flight. Refuses to know jobs and SQL: it reports
messages and, exactly once, the end; whoever listens decides what is requeued. One object is one process life:
to start again, make a new one. It is ready when it has shown that it can compute (`canary`). No torch here, only the
frames of `engine.wire`.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable

from engine import openmp
from engine.config import EngineConfig
from engine.request import Request, RequestId
from engine.wire import (
    Abort,
    Add,
    Completions,
    Configure,
    Fatal,
    FrameReader,
    FrameWriter,
    FromEngine,
    Hello,
    Stats,
    Stop,
    ToEngine,
    WireError,
)
from jobs.canary import canary, without
from jobs.python_process import command_of, environment_of

log = logging.getLogger(__name__)

_REQUESTS_PER_FRAME = 64
_REAP_SECONDS = 5.0  # between the end of its pipe and its exit; after that it is killed
# For one that a stop has killed. Less than a supervisor's `KILL_SECONDS`: nobody waits for its device, and who stops
# has outcomes to write before it is killed itself.
_LAST_SECONDS = 5.0


class EngineGoneError(RuntimeError):
    """The engine process has ended, or was never started."""


class NoCreditError(RuntimeError):
    """More requests were added than `available_credits`."""


class EngineProcess:
    """One engine process.

    `on_message(message)` is called for every message, in order, but `Hello` only when the engine has answered a
    canary, of which nothing else is told. `on_exit(returncode, ids)` is called once, after the last message:
    `returncode` as `subprocess` has it (negative: the signal), `ids` the requests that were added and not answered.
    Both run on this object's reader thread and must not call `stop` or `wait_exit`.
    If `on_message` raises, nobody knows what was taken: the process is killed and its ids are reported.
    `bar`: while it loads, the process shows a bar on our stderr, if that is a terminal; else it logs two lines.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        checkpoint_seconds: float | None = None,
        on_message: Callable[[FromEngine], None],
        on_exit: Callable[[int, tuple[RequestId, ...]], None],
        bar: bool = False,
    ) -> None:
        self.config = config
        self.checkpoint_seconds = checkpoint_seconds
        self._bar = bar
        self.hello: Hello | None = None  # of one that is ready
        self.proved_at: float | None = None  # monotonic: it was loaded, or then made a step of its canary
        self.fatal: Fatal | None = None
        self._on_message = on_message
        self._on_exit = on_exit
        self._lock = threading.Lock()
        self._turned = threading.Condition(self._lock)  # ready, or at its end
        self._greeting: Hello | None = None  # until it is ready
        self._canary_answered = False
        self._canary_stats: dict[str, int | float] = {}  # what it cost
        self._in_flight: dict[RequestId, None] = {}  # ordered
        self._gone = False
        self._outbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    # --- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process; returns at once, `Hello` follows when the model is loaded and computes.

        Call it from the main thread, or from one that lives as long as the engine should: the child asks for
        SIGKILL when its parent dies (PR_SET_PDEATHSIG), and to the operating system the parent is the thread
        that created it. The reader thread that calls `on_exit` is not such a thread.
        """
        if self._process is not None:
            raise RuntimeError("an EngineProcess is started once; make a new one")
        child_read, our_write = os.pipe()
        our_read, child_write = os.pipe()
        ends = {"--read-fd": child_read, "--write-fd": child_write, "--parent-pid": os.getpid()}
        command = command_of("engine.process", *(str(part) for end in ends.items() for part in end))
        command += ["--bar"] if self._bar else []
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=(child_read, child_write),
                stdin=subprocess.DEVNULL,
                env=environment_of(openmp.DEFAULTS),
            )
        except BaseException:
            os.close(our_write)
            os.close(our_read)
            raise
        finally:
            os.close(child_read)
            os.close(child_write)
        self._outbox.put(Configure(self.config, self.checkpoint_seconds))
        pid = self._process.pid
        self._reader = threading.Thread(
            target=self._read, args=(FrameReader(our_read),), name=f"engine-reader-{pid}", daemon=True
        )
        threading.Thread(
            target=self._write, args=(FrameWriter(our_write),), name=f"engine-writer-{pid}", daemon=True
        ).start()
        self._reader.start()

    def wait_ready(self, timeout: float) -> Hello:
        """Hello, once it came. Raises `EngineGoneError` with its reason, or TimeoutError (seconds)."""
        with self._turned:
            if not self._turned.wait_for(lambda: self.hello is not None or self._gone, timeout):
                raise TimeoutError(f"the engine process was not ready after {timeout:g} s")
            if self.hello is None or self._gone:
                raise EngineGoneError(self.fatal.reason if self.fatal else "the engine process has ended")
            return self.hello

    def wait_exit(self, timeout: float) -> int | None:
        """Its return code once `on_exit` has returned, or None if it lives after `timeout` seconds."""
        if self._process is None or self._reader is None:
            raise EngineGoneError("the engine process was never started")
        self._reader.join(timeout)
        return None if self._reader.is_alive() else self._process.returncode

    def stop(self, timeout: float) -> int:
        """Ask it to abort everything and exit; kill it after `timeout` seconds. Returns its return code."""
        if self._process is None:
            raise EngineGoneError("the engine process was never started")
        deadline = time.monotonic() + timeout
        self._outbox.put(Stop())
        if (code := self.wait_exit(max(0.0, deadline - time.monotonic()))) is not None:
            return code
        self.kill()
        if (code := self.wait_exit(_LAST_SECONDS)) is None:
            log.error("the engine process %d was killed and does not end", self._process.pid)
            self.abandon()
            return -signal.SIGKILL
        return code

    def kill(self) -> None:
        """SIGKILL; `on_exit` follows. Harmless when it is gone."""
        if self._process is not None:
            self._process.kill()

    def abandon(self) -> None:
        """Report its end though it has not ended: it was killed, and hangs in a call into a driver from which the
        kernel cannot take it. Here `on_exit` runs on the caller's thread. Nothing more is heard of it."""
        self._over(-signal.SIGKILL)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Started, and its end not yet noticed."""
        return self._process is not None and not self._gone

    # --- requests -------------------------------------------------------------------------------------------

    @property
    def available_credits(self) -> int:
        """How many requests may be added now; 0 before Hello and after the end."""
        with self._lock:
            return self._available()

    @property
    def in_flight(self) -> tuple[RequestId, ...]:
        """Ids added and not answered, in the order they were added."""
        with self._lock:
            return tuple(self._in_flight)

    def add(self, requests: Iterable[Request]) -> None:
        """Send requests; all or none. Each is answered by one Completion, or reported by `on_exit`.

        Raises `NoCreditError`, `EngineGoneError`, and ValueError for an id that is in flight already.
        """
        requests = tuple(requests)
        ids = dict.fromkeys(request.id for request in requests)
        with self._lock:
            if self._gone or self._process is None:
                raise EngineGoneError("the engine process has ended, or was never started")
            if len(requests) > self._available():
                raise NoCreditError(f"{len(requests)} requests for {self._available()} credits")
            if len(ids) < len(requests) or not ids.keys().isdisjoint(self._in_flight):
                raise ValueError("a request id is in flight already")
            self._in_flight |= ids
        for start in range(0, len(requests), _REQUESTS_PER_FRAME):
            self._outbox.put(Add(requests[start : start + _REQUESTS_PER_FRAME]))

    def abort(self, ids: Iterable[RequestId]) -> None:
        """Each that is still running comes back as a Completion with `aborted`. Never blocks or raises."""
        self._outbox.put(Abort(tuple(ids)))

    def _available(self) -> int:
        return 0 if self.hello is None or self._gone else self.hello.credits - len(self._in_flight)

    # --- threads --------------------------------------------------------------------------------------------

    def _write(self, frames: FrameWriter) -> None:
        """Its own thread, because a stopped engine does not read and nobody here may wait for it."""
        try:
            while (message := self._outbox.get()) is not None:
                frames.write(message)
        except OSError:
            pass  # it is gone: the reader sees the same and reports
        except Exception:
            log.exception("a message to the engine process could not be sent")
            self.kill()
        finally:
            frames.close()

    def _read(self, frames: FrameReader) -> None:
        try:
            while (message := frames.read()) is not None and not self._gone:
                self._take(message)
        except WireError as error:
            log.error("the engine process is killed: %s", error)
            self.kill()
        except Exception:
            log.exception("a message of the engine process could not be taken; the process is killed")
            self.kill()
        finally:
            frames.close()
            self._end()

    def _take(self, message: object) -> None:
        answered: list[RequestId] = []
        if self.hello is None and isinstance(message, FromEngine) and not isinstance(message, Fatal):
            if (ready := self._prove(message)) is None:
                return
            message = ready
        elif isinstance(message, Stats):
            message = Stats(without(self._canary_stats, message.values))
        with self._turned:
            if isinstance(message, Completions):
                # Freed before the callback, so that whoever it wakes sees the credits.
                answered = [c.id for c in message.completions if c.id in self._in_flight]
                for request_id in answered:
                    del self._in_flight[request_id]
            elif isinstance(message, Hello):
                self.hello = message
                self._turned.notify_all()
            elif isinstance(message, Fatal):
                self.fatal = message
            elif not isinstance(message, FromEngine):
                raise WireError(f"{type(message).__name__} does not come from an engine")
        try:
            self._on_message(message)
        except BaseException:
            with self._lock:
                self._in_flight |= dict.fromkeys(answered)
            raise

    def _prove(self, message: FromEngine) -> Hello | None:
        """Take a message of an engine that is not ready; Hello when it is."""
        if isinstance(message, Hello):
            self._greeting, self.proved_at = message, time.monotonic()
            self._outbox.put(Add((canary(message),)))
        elif isinstance(message, Completions):
            self._canary_answered = not any(one.aborted for one in message.completions)
        elif isinstance(message, Stats):
            if message.values.get("num_steps") != self._canary_stats.get("num_steps"):
                self.proved_at = time.monotonic()
            self._canary_stats = message.values
            return self._greeting if self._canary_answered else None
        return None

    def _end(self) -> None:
        assert self._process is not None
        try:
            code = self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        self._over(code)

    def _over(self, code: int) -> None:
        with self._turned:
            if self._gone:
                return
            self._gone = True
            ids = tuple(self._in_flight)
            self._in_flight.clear()
            self._turned.notify_all()
        self._outbox.put(None)
        self._on_exit(code, ids)
