"""The engine process: `python -m engine.process --read-fd N --write-fd M --parent-pid P [--bar]`.

Owns three threads. The reader turns frames into an inbox, the main thread loads the model, takes the inbox and
steps, the writer sends. So a step never waits for a pipe, and a worker's death is noticed during a step. The
first frame is `Configure`; `Hello` answers when the model is loaded.

It must not outlive its worker, whatever it is doing: the kernel is asked for SIGKILL at the parent's death
(prctl(2), PR_SET_PDEATHSIG), and the end of the pipe ends the process from the reader's own thread. Signals
meant for the worker's process group (INT, TERM, HUP, QUIT) are ignored: the worker says `Stop`.
After an exception in a step, or a broken invariant found when it turns idle, nothing can be trusted: `Fatal`, then
exit code 1. Without work it blocks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import logging
import os
import platform
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from engine.request import Completion, Rejected, Request, RequestError
from engine.wire import (
    Abort,
    Add,
    Completions,
    Configure,
    Fatal,
    FrameReader,
    FrameTooLargeError,
    FrameWriter,
    FromEngine,
    Grown,
    Hello,
    Message,
    Progress,
    Stats,
    Stop,
    Streamed,
    WireError,
)

if TYPE_CHECKING:
    from engine.engine import Engine

log = logging.getLogger(__name__)

CREDITS_PER_SEQUENCE = 4  # requests held per running sequence: enough that the queue here never runs dry
REPORT_SECONDS = 1.0
STREAM_SECONDS = 0.02  # between two frames for those who read along: a step or more
CHECK_SECONDS = 10.0  # a check walks over all pages: not after every single request of a quiet hour
_FLUSH_SECONDS = 5.0  # for the last frames, when a worker does not read them
_FEW_FRAMES = 16  # unsent; a worker that reads more slowly is not told of progress
_PR_SET_PDEATHSIG = 1
_ORPHANED = 2  # exit code when the worker is gone; nobody is left to read it


def main(arguments: list[str] | None = None) -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m engine.process")
    for name in ("--read-fd", "--write-fd", "--parent-pid"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--bar", action="store_true", help="show how far loading is, if stderr is a terminal")
    options = parser.parse_args(arguments)
    _tie_to_parent(options.parent_pid)
    for fd in (options.read_fd, options.write_fd):
        os.set_inheritable(fd, False)  # a compiler started from here must not hold the pipe open
    logging.basicConfig(level=logging.INFO, format="engine[%(process)d] %(levelname)s %(message)s")
    os._exit(_Process(options.read_fd, options.write_fd, bar=options.bar).run())


def _tie_to_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(_ORPHANED)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ignored, signal.SIG_IGN)


class _Process:
    def __init__(self, read_fd: int, write_fd: int, *, bar: bool) -> None:
        self._bar = bar
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._stopping = False
        self._reported_at = 0.0
        self._checked_at = float("-inf")
        self._grown_at = 0.0
        self._streamed_at = 0.0
        self._checkpoint_seconds = float("inf")
        self._was_busy: bool | None = None
        threading.Thread(target=self._read, args=(FrameReader(read_fd),), name="reader", daemon=True).start()
        self._writer = threading.Thread(
            target=self._write, args=(FrameWriter(write_fd),), name="writer", daemon=True
        )
        self._writer.start()

    def run(self) -> int:
        """Until Stop, or until something breaks. Returns the exit code."""
        phase: str = "start"
        try:
            engine = self._load()
            phase = "run"
            while not self._stopping:
                self._turn(engine)
        except Exception as error:
            # A checkpoint or setting that cannot work says why itself; anything else needs its traceback.
            explained = phase == "start" and isinstance(error, ValueError)
            log.error("the engine cannot go on: %s", error, exc_info=not explained)
            self._outbox.put(
                Fatal(f"{type(error).__name__}: {error}", "start" if phase == "start" else "run")
            )
            self._flush()
            return 1
        self._flush()
        return 0

    def _load(self) -> Engine:
        first = self._inbox.get()
        if not isinstance(first, Configure):
            raise WireError(f"the first message must be Configure, not {type(first).__name__}")
        started = time.perf_counter()
        from engine.engine import (
            Engine,
        )  # loads torch with the model, after the process is tied to its parent

        engine = Engine.load(first.config, bar=self._bar)
        # torch's half a million objects stay: no collection need walk over them, for 0.1 s in a step. Requests are no
        # garbage either, and mostly gone before a collection this rare would look at them.
        gc.freeze()
        gc.set_threshold(20_000, 10, 10)
        config = first.config
        if first.checkpoint_seconds is not None:
            self._checkpoint_seconds = first.checkpoint_seconds
        self._credits = config.max_num_requests or CREDITS_PER_SEQUENCE * config.max_num_seqs
        runner = engine.runner
        self._outbox.put(
            Hello(
                model=first.config.model,
                pid=os.getpid(),
                max_model_len=engine.max_model_len,
                num_pages=runner.num_pages,
                page_size=runner.page_size,
                max_num_seqs=first.config.max_num_seqs,
                credits=self._credits,
                vocab_size=runner.model_config.vocab_size,
                device=runner.device,
                dtype=runner.dtype,
                kernels=runner.kernels_name,
                deterministic=runner.deterministic,
                versions={"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
                load_seconds=time.perf_counter() - started,
            )
        )
        return engine

    def _turn(self, engine: Engine) -> None:
        """Take what came, compute one step, report. Waits for a message when there is no work."""
        completions: list[Completion] = []
        wait = not engine.has_work
        while not self._stopping:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                break
            wait = False
            completions += self._take(engine, message)
        self._send(completions)
        if engine.has_work:
            self._report(engine)  # says that it turned busy, before a first long step
            self._send(engine.step())
            if engine.num_requests == 0 and time.monotonic() - self._checked_at > CHECK_SECONDS:
                engine.check()  # time to look: whatever is wrong with the pages must not go on
                self._checked_at = time.monotonic()
        self._report(engine)

    def _take(self, engine: Engine, message: Message) -> list[Completion]:
        match message:
            case Add():
                return [answer for request in message.requests if (answer := self._add(engine, request))]
            case Abort():
                return [answer for request_id in message.ids if (answer := engine.abort(request_id))]
            case Stop():
                self._stopping = True
                return [answer for request_id in engine.request_ids if (answer := engine.abort(request_id))]
            case _:
                raise WireError(f"{type(message).__name__} is not for a running engine")

    def _add(self, engine: Engine, request: Request) -> Completion | None:
        """None when it is in; the answer when it is not. What is `aborted` here can run elsewhere as it is."""
        num_prompt = len(request.prompt_token_ids)
        if request.id in engine:
            raise WireError(f"the request {tuple(request.id)} was added while it was in flight")
        if engine.num_requests >= self._credits:
            return Completion(id=request.id, aborted=True, num_prompt=num_prompt)
        try:
            engine.add(request)
        except Rejected as rejected:
            error = RequestError(code=rejected.code, message=rejected.message)
            return Completion(id=request.id, error=error, num_prompt=num_prompt)
        return None

    def _report(self, engine: Engine) -> None:
        """Streams and checkpoints; Stats and progress once a second, Stats also when it turns busy or idle."""
        now = time.monotonic()
        few = self._outbox.qsize() < _FEW_FRAMES
        due = few and engine.num_streams > 0 and now - self._streamed_at >= STREAM_SECONDS
        if due and (growths := engine.streamed()):
            self._streamed_at = now
            self._outbox.put(Streamed(tuple(growths)))
        if now - self._grown_at >= self._checkpoint_seconds and few:
            self._grown_at = now
            if growths := engine.grown():
                self._outbox.put(Grown(tuple(growths)))
        due = now - self._reported_at >= REPORT_SECONDS
        if not due and engine.has_work == self._was_busy:
            return
        self._was_busy = engine.has_work
        self._reported_at = now
        self._outbox.put(Stats(engine.stats()))
        if due and engine.has_work and self._outbox.qsize() < _FEW_FRAMES:  # lossy
            self._outbox.put(Progress(engine.progress()))

    def _send(self, completions: list[Completion]) -> None:
        if completions:
            self._outbox.put(Completions(tuple(completions)))

    def _flush(self) -> None:
        self._outbox.put(None)
        self._writer.join(_FLUSH_SECONDS)

    # --- threads --------------------------------------------------------------------------------------------

    def _read(self, frames: FrameReader) -> None:
        """Ends the whole process when the pipe ends or brings nonsense, even while the main thread is in a step."""
        try:
            while (message := frames.read()) is not None:
                self._inbox.put(message)
        except WireError as error:
            log.error("the worker sent a frame that cannot be read: %s", error)
        except BaseException:
            log.exception("the pipe from the worker cannot be read")
        os._exit(_ORPHANED)

    def _write(self, frames: FrameWriter) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                _write_whole(frames, message)
        except BaseException as error:
            if not isinstance(error, BrokenPipeError):
                log.exception("the pipe to the worker cannot be written")
            os._exit(_ORPHANED)


def _write_whole(frames: FrameWriter, message: FromEngine) -> None:
    try:
        frames.write(message)
    except FrameTooLargeError:
        for half in _halves(message):
            _write_whole(frames, half)


def _halves(message: FromEngine) -> tuple[FromEngine, FromEngine]:
    match message:
        case Completions(completions) if middle := len(completions) // 2:
            return Completions(completions[:middle]), Completions(completions[middle:])
        case Grown(growths) if middle := len(growths) // 2:
            return Grown(growths[:middle]), Grown(growths[middle:])
        case Streamed(growths) if middle := len(growths) // 2:
            return Streamed(growths[:middle]), Streamed(growths[middle:])
    raise WireError(f"one {type(message).__name__} takes more than a frame may")


if __name__ == "__main__":
    main()
