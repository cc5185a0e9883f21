"""Compiling: runs whose grammar is being compiled, outside the scheduler and off the thread that steps.

Owns the threads, who waits for what, and the budget of time. Everybody else goes on at full speed meanwhile: the
library lets go of the interpreter's lock. A step costs the same however many wait. Knows neither grammars
(`grammars`) nor pages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from typing import NamedTuple

from engine.grammars import GrammarError, Grammars
from engine.matcher import Matcher
from engine.request import RequestError
from engine.run import Run
from engine.sequence import Sequence
from engine.structured_outputs import StructuredOutputsParams

log = logging.getLogger(__name__)

NUM_THREADS = 2
BUDGET_SECONDS = 10.0  # from the start of a compile; its limits stop it long before


class Compiled(NamedTuple):
    """A run that waits no more: its live sequences have their matchers, or `error` says why not."""

    run: Run
    sequences: list[Sequence]
    error: RequestError | None


class _Task:
    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.generated = [tuple(sequence.generated) for sequence in sequences]
        self.started_at: float | None = None  # written by the thread that works on it
        self.future: Future[list[Matcher]]

    def work(self, grammars: Grammars, params: StructuredOutputsParams) -> list[Matcher]:
        self.started_at = time.monotonic()
        return grammars.matchers(params, self.generated, self.sequences[0].request.begins)


class Compiling:
    """Made when the first request asks for a grammar: its threads start then and not before."""

    def __init__(self, grammars: Grammars, budget_seconds: float = BUDGET_SECONDS) -> None:
        self._grammars = grammars
        self._budget_seconds = budget_seconds
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._tasks: dict[Run, _Task] = {}  # begun in this order
        self._ended: SimpleQueue[Run] = SimpleQueue()  # filled by the threads
        self._seen: list[Run] = []  # taken out of it, not yet asked for

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences that wait here."""
        return (sequence for task in self._tasks.values() for sequence in task.sequences)

    def add(self, run: Run, sequences: list[Sequence]) -> None:
        """`sequences`: those of `run` that are not at their end yet; the request asks for structured outputs."""
        params = sequences[0].request.sampling.structured_outputs
        assert params is not None
        task = self._tasks[run] = _Task(sequences)
        task.future = self._threads.submit(task.work, self._grammars, params)
        task.future.add_done_callback(lambda _: self._note(run))

    def _note(self, run: Run) -> None:
        """Its compile has ended. On the thread that did it."""
        if run in self._tasks:
            self._ended.put(run)

    def remove(self, run: Run) -> None:
        """It is wanted no more, if it was here at all."""
        if task := self._tasks.pop(run, None):
            task.future.cancel()

    def wait(self, seconds: float) -> None:
        """Until one is done, but not for longer."""
        with suppress(Empty):
            self._seen.append(self._ended.get(timeout=seconds))

    def take(self) -> Iterable[Compiled]:
        """Those that are done, in the order they were, and those that take too long, taken out."""
        over, self._seen = self._seen, []
        while not self._ended.empty():
            over.append(self._ended.get())
        oldest = islice(self._tasks.items(), NUM_THREADS + len(over))  # nobody else can have begun
        over += [run for run, task in oldest if self._is_late(task)]
        wanted = [run for run in dict.fromkeys(over) if run in self._tasks]
        return [self._finish(run, self._tasks.pop(run)) for run in wanted]

    def _is_late(self, task: _Task) -> bool:
        return task.started_at is not None and time.monotonic() - task.started_at > self._budget_seconds

    def _finish(self, run: Run, task: _Task) -> Compiled:
        if not task.future.done():
            params = task.sequences[0].request.sampling.structured_outputs
            assert params is not None
            return _failed(
                run, task, f"{params.param}: takes longer to compile than {self._budget_seconds:g} s"
            )
        failure = task.future.exception()
        if isinstance(failure, GrammarError):
            return _failed(run, task, str(failure), failure.code)
        if failure is not None:  # a fault of the library: not one to die of
            log.error("a grammar could not be compiled", exc_info=failure)
            return _failed(run, task, f"structured_outputs: cannot be compiled: {failure}")
        for sequence, matcher in zip(task.sequences, task.future.result(), strict=True):
            sequence.matcher = matcher
        return Compiled(run, task.sequences, None)


def _failed(run: Run, task: _Task, message: str, code: str = "invalid_request") -> Compiled:
    return Compiled(run, task.sequences, RequestError(code=code, message=message))
