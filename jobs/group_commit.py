"""GroupCommit: what several threads want to write at the same time goes into one transaction.

Owns the queue and whose turn it is. A commit that is synced to disk costs milliseconds, whatever is in it; while one
is under way others gather behind it, and the first of them takes all along. Nobody waits for company: alone, a thread
writes at once. Knows nothing of what is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Entry(Generic[T, R]):
    __slots__ = ("error", "item", "outcome")

    def __init__(self, item: T) -> None:
        self.item = item
        self.outcome: R | Exception | None = None  # None: not written yet
        self.error: BaseException | None = None  # of the transaction, which is nobody's own


class GroupCommit(Generic[T, R]):
    """`write` is given some items, in the order in which they came, and returns for each its result or the error that
    is its alone. What it raises is raised to everyone whose item it had."""

    def __init__(self, write: Callable[[Sequence[T]], Sequence[R | Exception]], *, most: int = 256) -> None:
        self._write = write
        self._most = most
        self._queue: list[_Entry[T, R]] = []
        self._queued = threading.Lock()
        self._turn = threading.Lock()

    def add(self, item: T) -> R:
        """The result of `item`. Raises its error."""
        entry: _Entry[T, R] = _Entry(item)
        with self._queued:
            self._queue.append(entry)
        with self._turn:  # whoever had it before may have written ours
            while entry.outcome is None and entry.error is None:
                self._take()
        if entry.error is not None:
            raise entry.error
        if isinstance(entry.outcome, Exception):
            raise entry.outcome
        assert entry.outcome is not None
        return entry.outcome

    def _take(self) -> None:
        with self._queued:
            entries, self._queue = self._queue[: self._most], self._queue[self._most :]
        try:
            outcomes = self._write([entry.item for entry in entries])
        except BaseException as error:
            for entry in entries:
                entry.error = error
            return
        for entry, outcome in zip(entries, outcomes, strict=True):
            entry.outcome = outcome
