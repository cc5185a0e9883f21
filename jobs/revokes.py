"""Revokes: the thread that cancels in SQL what somebody revoked through Celery.

Owns the step from a command of the broker to a state in SQL, away from Celery's event loop, which must not wait for a
database. A job that runs here or on another worker is stopped by its worker's next renewal (`jobs.cancels`); one that
waited is over, and Celery is told.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from jobs.cancels import Cancels
from jobs.celery_results import CeleryResults
from jobs.database import Database
from jobs.states import JobState

log = logging.getLogger(__name__)


class Revokes(threading.Thread):
    """`on_cancelling()` is called when a job has been told to stop, which may be one of ours."""

    def __init__(self, database: Database, results: CeleryResults, on_cancelling: Callable[[], None]) -> None:
        super().__init__(name="revokes", daemon=True)
        self._cancels = Cancels(database)
        self._results = results
        self._on_cancelling = on_cancelling
        self._inbox: queue.SimpleQueue[tuple[Sequence[str], bool] | None] = queue.SimpleQueue()

    def put(self, job_ids: Sequence[str], *, running: bool) -> None:
        """Cancel these; a job that runs only if `running`. Returns at once."""
        self._inbox.put((job_ids, running))

    def stop(self, timeout: float) -> None:
        """Cancel what was put so far, within `timeout` seconds."""
        self._inbox.put(None)
        if self.is_alive():
            self.join(timeout)

    def run(self) -> None:
        while (command := self._inbox.get()) is not None:
            job_ids, running = command
            for job_id in job_ids:
                try:
                    self._revoke(job_id, running)
                except Exception:
                    log.exception("revokes.failed")

    def _revoke(self, job_id: str, running: bool) -> None:
        state = self._cancels.revoke(job_id, running=running)
        if state is JobState.CANCELLED:
            self._results.revoked(job_id)
        elif state is JobState.CANCELLING:
            self._on_cancelling()
