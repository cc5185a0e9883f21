"""Clerks: threads of every api process that do the slow work of batches that came as a file.

Owns the loop: lease a batch (`jobs.desk`), check its file, make its jobs, or write its output, whatever comes next,
and look after expired files and leftovers in between. What fails for a passing reason is tried again when the lease
has run out, here or in another process. Refuses to know what each step does.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from jobs.batch_intake import BatchIntake
from jobs.batch_output import BatchOutput
from jobs.database import Database
from jobs.desk import BatchLease, LeaseLost, take
from jobs.drafts import DraftFile
from jobs.file_batches import FileBatches
from jobs.file_store import FileStore
from jobs.files import Files
from jobs.models import Batch
from jobs.settings import Settings
from jobs.states import BatchState

log = logging.getLogger(__name__)

NUM_CLERKS: Final = 2  # so that a small batch does not wait for a large one
LOOK_SECONDS: Final = 1.0  # for batches that other processes have made or ended
TIDY_SECONDS: Final = 600.0  # between two looks for leftovers on disk
STOP_SECONDS: Final = 10.0


class Clerk:
    """The work itself, a batch at a time, in whatever thread calls it."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        announce: Callable[[str], None],
        stopping: threading.Event | None = None,
    ) -> None:
        self._store = store = FileStore(settings.files)
        self._database = database
        self._seconds = settings.lease_seconds
        self._stopping = stopping or threading.Event()
        self._batches = FileBatches(database, settings, store)
        self._intake = BatchIntake(database, settings, store, announce)
        self._output = BatchOutput(database, settings, store)

    def work_once(self) -> bool:
        """Do what one batch needs now; False when there is none."""
        lease = take(self._database, self._seconds, self._stopping)
        if lease is None:
            return False
        try:
            self._work(lease)
        except LeaseLost:
            log.info("clerk.stopped batch=%s", lease.batch_id)
        lease.release()
        return True

    def _work(self, lease: BatchLease) -> None:
        query = select(Batch.state, Batch.finalizing_at).where(Batch.id == lease.batch_id)
        with self._database.read() as connection:
            batch = connection.execute(query).one()
        if batch.finalizing_at is not None:
            self._output.finish(lease)
            return
        with DraftFile(self._store.scratch()) as drafts:
            if batch.state == BatchState.VALIDATING:
                self._batches.validate(lease, drafts)
            self._intake.insert(lease, drafts)


class Clerks:
    """`announce(model)` is called after each commit of new jobs."""

    def __init__(self, database: Database, settings: Settings, announce: Callable[[str], None]) -> None:
        self._stopping = threading.Event()
        self._noticed = threading.Condition()
        self._num_notices = 0
        self._clerk = Clerk(database, settings, announce, self._stopping)
        self._files = Files(database, settings)
        self._sweep_seconds = settings.sweep_seconds
        self._threads = [
            threading.Thread(target=work, name=f"clerk-{index}", daemon=True)
            for index, work in enumerate([self._run] * NUM_CLERKS + [self._tidy])
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def notice(self) -> None:
        """There is a new batch. Without this it is seen within `LOOK_SECONDS`."""
        with self._noticed:
            self._num_notices += 1
            self._noticed.notify_all()

    def stop(self) -> None:
        """What is being done is left to others, at a point where they go on."""
        self._stopping.set()
        self.notice()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            seen = self._num_notices
            if self._safely(self._clerk.work_once):
                continue
            with self._noticed:
                if self._num_notices == seen:  # one that came during the look counts
                    self._noticed.wait(LOOK_SECONDS)

    def _tidy(self) -> None:
        tidied = -TIDY_SECONDS
        while not self._stopping.wait(self._sweep_seconds):
            self._safely(self._files.end_expired)
            if time.monotonic() - tidied >= TIDY_SECONDS:
                tidied = time.monotonic()
                self._safely(self._files.clean)

    def _safely(self, work: Callable[[], int]) -> int:
        try:
            return work()
        except (SQLAlchemyError, OSError) as error:
            log.warning("clerk.failed error=%s", type(error).__name__)
        except Exception as error:
            # Its kind and place, not its text, which may hold a client's words.
            place = "".join(traceback.format_tb(error.__traceback__))
            log.error("clerk.broken error=%s\n%s", type(error).__name__, place)
        return 0
