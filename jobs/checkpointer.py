"""Checkpointer: the thread that saves what running jobs have made.

Owns the parts that are not in SQL yet. While the database is away they wait, put together, so that they take no more
memory than the tokens do. A part whose job has ended, or is no longer ours, is dropped: its fence says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from engine.growth import Growth, join
from engine.request import RequestId
from jobs.checkpoints import save
from jobs.database import Database, cause
from jobs.holdings import Holdings

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
STOP_SECONDS = 10.0


class Checkpointer(threading.Thread):
    """`put` and `flush` may be called from any thread."""

    def __init__(
        self, database: Database, holdings: Holdings, worker_id: Callable[[], str], weights: str
    ) -> None:
        super().__init__(name="checkpointer", daemon=True)
        self.database = database
        self.holdings = holdings
        self.worker_id = worker_id
        self.weights = weights
        self._turn = threading.Condition()
        self._waiting: dict[RequestId, Growth] = {}
        self._saving = False
        self._stopping = False

    def put(self, growths: Sequence[Growth]) -> None:
        with self._turn:
            self._add(growths)
            self._turn.notify_all()

    def _add(self, growths: Iterable[Growth]) -> None:
        for growth in growths:
            before = self._waiting.get(growth.id)
            self._waiting[growth.id] = growth if before is None else _joined(before, growth)

    def flush(self, timeout: float) -> bool:
        """Wait until all that was put is in SQL, or dropped; False when that took longer than `timeout` seconds."""
        with self._turn:
            return self._turn.wait_for(lambda: not self._waiting and not self._saving, timeout)

    def stop(self) -> None:
        """What is not saved yet stays unsaved."""
        with self._turn:
            self._stopping = True
            self._turn.notify_all()
        if self.is_alive():
            self.join(STOP_SECONDS)

    def run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                growths, self._waiting, self._saving = list(self._waiting.values()), {}, True
            saved = self._save(growths)
            with self._turn:
                self._saving = False
                if not saved:  # newer parts go behind these
                    newer, self._waiting = self._waiting, {growth.id: growth for growth in growths}
                    self._add(newer.values())
                self._turn.notify_all()
                if not saved:
                    self._turn.wait_for(lambda: self._stopping, RETRY_SECONDS)

    def _save(self, growths: list[Growth]) -> bool:
        try:
            running = self.database.transact(
                lambda connection: save(
                    connection, worker_id=self.worker_id(), weights=self.weights, growths=growths
                ),
                patience=PATIENCE_SECONDS,
            )
        except SQLAlchemyError as error:
            log.error("checkpointer.database error=%s", cause(error))
            return False
        except Exception:
            log.exception("checkpointer.failed parts=%d", len(growths))
            return True  # these parts are lost, the job is not
        self.holdings.saved(growth for growth in growths if growth.id in running)
        return True


def _joined(first: Growth, second: Growth) -> Growth:
    """One growth from the start of `first`; without what `second` has behind a gap."""
    offset = tuple(start - begin for start, begin in zip(second.starts, first.starts, strict=True))
    if any(start < 0 for start in offset):
        return first
    shifted = Growth(id=second.id, starts=offset, generated=second.generated)
    whole = join([Growth(id=first.id, starts=(0,) * len(first.starts), generated=first.generated), shifted])
    return Growth(id=first.id, starts=first.starts, generated=whole)
