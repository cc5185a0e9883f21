"""LineChecker: a second process that checks blocks of lines, so that a long file has two processors.

Owns both ends of its two pipes. The clerk's thread goes on checking blocks itself and looks at the pipes between two
of them; neither end ever waits for the other, since what is on its way fits into the pipes or stays here. The process
knows nothing but its blocks: when it dies, they are checked here, and it ends with the pipe that it reads. Frames are
a length and msgpack. Refuses to know what a line must be (`jobs.line_check`).
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO, Final

from engine import codec
from jobs.line_check import BLOCK_BYTES, Block, Found, LineCheck
from jobs.python_process import command_of, environment_of
from jobs.settings import Settings

log = logging.getLogger(__name__)

AHEAD: Final = 3  # blocks given to it and not answered, so that it never waits for more
WORTH_BYTES: Final = 40 * BLOCK_BYTES  # of a file; a shorter one is checked before the process has started
_PIPE_BYTES: Final = 1 << 20  # what Linux allows everybody
_HEAD: Final = struct.Struct("<Q")  # of a frame: its bytes
_LIMITS: Final = ("max_body_bytes", "max_n", "default_max_tokens", "max_batch_jobs")


def is_worth(size: int) -> bool:
    """Whether a file of `size` bytes is done sooner with a second process."""
    return size >= WORTH_BYTES and len(os.sched_getaffinity(0)) > 1


class LineChecker:
    """One process for one file; close it. Used by one thread."""

    def __init__(self, check: LineCheck) -> None:
        """Raises `OSError` when no process can be made."""
        self._process = subprocess.Popen(
            command_of("jobs.line_checker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment_of(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        for end in (self._to, self._from):
            os.set_blocking(end, False)
            with suppress(OSError):  # smaller ones are slower
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._out, self._in = bytearray(), bytearray()
        self._given: dict[int, Block] = {}  # by number, in order
        self._found: dict[int, Found] = {}
        self._ready = False  # it takes a while to start, in which nobody should wait for it
        self.alive = True
        limits = {name: getattr(check.settings, name) for name in _LIMITS}
        self._put([check.endpoint, limits, sorted(check.known_models), check.key, check.drafts])

    def offer(self, block: Block) -> bool:
        """Whether it takes this block."""
        self._move()
        if not self.alive or not self._ready or len(self._given) >= AHEAD:
            return False
        self._given[block.number] = block
        self._put(block)
        return True

    def take(self, block: Block, *, wait: bool) -> Found | None:
        """What it found in a block that it took; None: it has not ended yet, or, if `wait`, never will."""
        self._move()
        while wait and self.alive and block.number in self._given:
            self._wait()
        return self._found.pop(block.number, None)

    def _put(self, value: object) -> None:
        packed = codec.pack(value)
        self._out += _HEAD.pack(len(packed)) + packed
        self._move()

    def _wait(self) -> None:
        """Until a pipe gives or takes something."""
        waiting = select.poll()
        waiting.register(self._from, select.POLLIN)
        if self._out:
            waiting.register(self._to, select.POLLOUT)
        waiting.poll()
        self._move()

    def _move(self) -> None:
        """Whatever the pipes take and give now."""
        if not self.alive:
            return None
        try:
            while self._out:
                del self._out[: os.write(self._to, self._out)]
        except BlockingIOError:
            pass
        except OSError:
            return self._lost()
        try:
            while data := os.read(self._from, _PIPE_BYTES):
                self._in += data
        except BlockingIOError:
            pass
        else:
            return self._lost()
        while len(self._in) >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._in)
            if len(self._in) < _HEAD.size + size:
                break
            self._heard(codec.unpack(bytes(self._in[_HEAD.size : _HEAD.size + size])))
            del self._in[: _HEAD.size + size]
        return None

    def _heard(self, said: Any) -> None:
        self._ready = True
        if said is not None:
            number, found = said
            del self._given[number]
            self._found[number] = Found(*found)

    def _lost(self) -> None:
        self.alive = False
        self._given.clear()
        log.warning("line_checker.lost exit=%s", self._process.poll())

    def close(self) -> None:
        """At once; it holds nothing that anybody misses."""
        self.alive = False
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def __enter__(self) -> LineChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _frames(pipe: BinaryIO) -> Iterator[Any]:
    while len(head := pipe.read(_HEAD.size)) == _HEAD.size:
        (size,) = _HEAD.unpack(head)
        if len(body := pipe.read(size)) < size:
            return
        yield codec.unpack(body)


def _say(value: object) -> None:
    body = codec.pack(value)
    sys.stdout.buffer.write(_HEAD.pack(len(body)) + body)
    sys.stdout.buffer.flush()


def main() -> None:
    """The other end: blocks in, findings out, until nobody is there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whom we work for
    frames = _frames(sys.stdin.buffer)
    if (rules := next(frames, None)) is None:
        return
    endpoint, limits, known_models, key, drafts = rules
    check = LineCheck(
        endpoint, Settings(**limits), known_models=frozenset(known_models), key=key, drafts=drafts
    )
    with suppress(BrokenPipeError):
        _say(None)  # ready
        for given in frames:
            block = Block(*given)
            _say([block.number, check.check(block)])
    os._exit(0)  # nothing is left to flush into a pipe that may be closed


if __name__ == "__main__":
    main()
