"""Timekeeper: a loop in every worker and every api that fires the schedules whose time has come.

Owns the loop. Looking costs one probe of an index; any number of processes may look at once, and each time fires
once (`jobs.schedule_runs`). A schedule that cannot be fired holds up no other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from jobs.database import Database, cause
from jobs.intake import Intake
from jobs.schedule_runs import PAGE, ScheduleRuns

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0


class Timekeeper(threading.Thread):
    """Looks every `look_seconds`. `announce(model)` is called for each model that a run has jobs for."""

    def __init__(
        self, database: Database, intake: Intake, look_seconds: float, announce: Callable[[str], None]
    ) -> None:
        super().__init__(name="timekeeper", daemon=True)
        self.runs = ScheduleRuns(database, intake)
        self.look_seconds = look_seconds
        self.announce = announce
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self.look_seconds):
            try:
                self.look()
            except SQLAlchemyError as error:
                log.warning("timekeeper.database error=%s", cause(error))
            except Exception:
                log.exception("timekeeper.failed")

    def look(self) -> int:
        """Fire whatever is due; how many runs that made."""
        num_runs = 0
        due = self.runs.due()
        while due and not self._stopping.is_set():
            num_runs += sum(self._fire(schedule_id) for _, schedule_id in due)
            due = self.runs.due(due[-1]) if len(due) == PAGE else []
        return num_runs

    def _fire(self, schedule_id: str) -> bool:
        try:
            started = self.runs.fire(schedule_id)
        except Exception as error:
            # Its kind only: the text of an exception may hold what the jobs say.
            log.error("timekeeper.not_fired schedule=%s error=%s", schedule_id, type(error).__name__)
            return False
        if started is None:
            return False
        run = started.run
        log.info("timekeeper.fired schedule=%s run=%s kind=%s", schedule_id, run.id, run.kind)
        if run.error is not None:
            log.warning("timekeeper.refused schedule=%s code=%s", schedule_id, run.error["code"])
        for model in started.batch.models if started.batch else ():
            self.announce(model)
        return True

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join(STOP_SECONDS)
