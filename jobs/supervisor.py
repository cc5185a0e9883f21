"""EngineSupervisor: keeps one engine process alive for as long as the worker lives.

Owns the thread that starts engine processes, one after another; it lives as long as the worker, because the
kernel ties a child's parent-death signal to the thread that made it. A death is reported with the requests
that were in flight; what becomes of them is the worker's decision. Knows no SQL.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from engine.config import EngineConfig
from engine.growth import Growth
from engine.request import Completion, Request, RequestId
from engine.wire import Completions, FromEngine, Grown, Hello, Progress, Stats, Streamed
from jobs.engine_figures import EngineFigures
from jobs.engine_process import EngineProcess

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3  # deaths in a row before any token: the model cannot be served here
MAX_BACKOFF_SECONDS = 30.0
STOP_SECONDS = 5.0
KILL_SECONDS = 30.0  # for a process that was killed to end


class EngineSupervisor(threading.Thread):
    """Callbacks run on the engine reader's thread, except `on_hopeless`, which runs on this one, and `on_death` of an
    engine that cannot be killed, which runs on the thread of `kill_if_stalled`.

    `on_death(returncode, ids, stalled)` follows an unordered death, `stalled` when it was killed for making no steps;
    `on_hopeless(reason)` says that starting is given up.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        checkpoint_seconds: float | None = None,
        on_ready: Callable[[Hello], None],
        on_completions: Callable[[Sequence[Completion]], None],
        on_progress: Callable[[dict[RequestId, int]], None],
        on_grown: Callable[[Sequence[Growth]], None],
        on_streamed: Callable[[Sequence[Growth]], None],
        on_death: Callable[[int, tuple[RequestId, ...], bool], None],
        on_hopeless: Callable[[str], None],
    ) -> None:
        super().__init__(name="engine-supervisor", daemon=True)
        self.config = config
        self.checkpoint_seconds = checkpoint_seconds
        self.on_ready = on_ready
        self.on_completions = on_completions
        self.on_progress = on_progress
        self.on_grown = on_grown
        self.on_streamed = on_streamed
        self.on_death = on_death
        self.on_hopeless = on_hopeless
        self.num_starts = 0
        self.hello: Hello | None = None  # of the process that runs now
        self.figures = EngineFigures({}, {})  # replaced whole, so that readers see both parts of one moment
        self.moved_at = time.monotonic()  # when it last showed progress
        self._process: EngineProcess | None = None
        self._killed: tuple[EngineProcess, float] | None = None  # for making no steps, and when
        self._stopping = threading.Event()
        self._ended = threading.Event()

    @property
    def stats(self) -> dict[str, int | float]:
        """What the engine that runs now said of itself last; empty while it starts."""
        return self.figures.now

    # --- requests -------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many requests the engine takes now; 0 while it is starting or gone."""
        process = self._process
        return process.available_credits if process and self.hello else 0

    @property
    def num_in_flight(self) -> int:
        process = self._process
        return len(process.in_flight) if process else 0

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process and process.alive else None

    def add(self, requests: Sequence[Request]) -> None:
        """Raises `EngineGoneError` or `NoCreditError`; then none of them was taken."""
        process = self._process
        assert process is not None, "room was 0"
        if not process.in_flight:
            self.moved_at = time.monotonic()  # it stood still for want of work
        process.add(requests)

    def abort(self, ids: Sequence[RequestId]) -> None:
        if ids and (process := self._process):
            process.abort(ids)

    def kill_if_stalled(self, step_seconds: float, start_seconds: float) -> None:
        """A busy engine that shows no step for so long hangs, also of its canary, and one that is not loaded after
        so long does too: end it, so that its death can be dealt with. One that even the kernel cannot end, because it
        hangs in a driver, counts as dead `KILL_SECONDS` later."""
        process = self._process
        if process is None or not process.alive:
            return
        still = time.monotonic() - max(self.moved_at, process.proved_at or 0.0)
        if self._killed is not None and self._killed[0] is process:
            if time.monotonic() - self._killed[1] > KILL_SECONDS:
                log.error("engine.unkillable pid=%s: it may keep the device's memory", process.pid)
                process.abandon()
            return
        busy = self.hello is None or process.in_flight
        if busy and still > (start_seconds if process.proved_at is None else step_seconds):
            log.error("engine.stalled pid=%s seconds=%.0f", process.pid, still)
            self._killed = process, time.monotonic()
            process.kill()

    # --- life -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        failed_starts = 0
        while not self._stopping.is_set():
            self._ended.clear()
            process = EngineProcess(
                self.config,
                checkpoint_seconds=self.checkpoint_seconds,
                on_message=self._take,
                on_exit=self._end,
            )
            self._process = process
            self.num_starts += 1
            self.moved_at = time.monotonic()
            try:
                process.start()
                log.info("engine.start pid=%s start=%d", process.pid, self.num_starts)
                if self._stopping.is_set():  # `stop` came too early to see it
                    process.kill()
                self._ended.wait()
            except OSError as error:  # no memory or no descriptors for another process
                log.error("engine.start_failed error=%s", error)
            if self._stopping.is_set():
                return
            failed_starts = 0 if process.hello else failed_starts + 1
            if failed_starts >= MAX_FAILED_STARTS:
                self.on_hopeless(
                    process.fatal.reason
                    if process.fatal
                    else "the engine process died while loading, or of its first steps"
                )
                return
            self._stopping.wait(min(0.2 * 2**failed_starts, MAX_BACKOFF_SECONDS))

    def stop(self) -> None:
        """End the engine process and this thread; requests still in flight are not reported."""
        self._stopping.set()
        process = self._process
        if process and process.alive:
            process.stop(STOP_SECONDS)
        if self.is_alive():
            self.join(STOP_SECONDS)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Completions():
                self.moved_at = time.monotonic()
                self.on_completions(message.completions)
            case Progress():
                self.on_progress(message.num_generated)
            case Grown():
                self.on_grown(message.growths)
            case Streamed():
                self.on_streamed(message.growths)
            case Stats():
                if message.values.get("num_steps") != self.stats.get("num_steps"):
                    self.moved_at = time.monotonic()
                self.figures = EngineFigures(message.values, self.figures.before)
            case Hello():
                self.moved_at = time.monotonic()
                self.hello = message
                log.info("engine.ready pid=%d device=%s dtype=%s pages=%d", message.pid, message.device,
                         message.dtype, message.num_pages)  # fmt: skip
                self.on_ready(message)

    def _end(self, returncode: int, ids: tuple[RequestId, ...]) -> None:
        self.hello = None
        self.figures = self.figures.after_death()
        try:
            if not self._stopping.is_set():
                log.error("engine.died returncode=%d in_flight=%d", returncode, len(ids))
                stalled = self._killed is not None and self._killed[0] is self._process
                self.on_death(returncode, ids, stalled)
        finally:
            self._ended.set()
