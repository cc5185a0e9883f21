"""Services: what the routes need, in one frozen value that `create_app` makes and hands down."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask

from api.waits import Waits
from jobs.batch_reads import BatchReads
from jobs.cancels import Cancels
from jobs.completion_order import CompletionOrder
from jobs.file_batches import FileBatches
from jobs.files import Files
from jobs.forecasts import Forecasts
from jobs.intake import Intake
from jobs.reads import Reads
from jobs.retries import Retries
from jobs.schedule_runs import ScheduleRuns
from jobs.schedules import Schedules
from jobs.settings import Settings
from jobs.tenants import Tenants
from jobs.usage import Usages

log = logging.getLogger(__name__)
Wake = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    intake: Intake
    files: Files
    file_batches: FileBatches
    batch_reads: BatchReads
    reads: Reads
    forecasts: Forecasts
    cancels: Cancels
    waits: Waits
    schedules: Schedules
    runs: ScheduleRuns
    wake: Wake
    order: CompletionOrder
    retries: Retries
    usages: Usages
    tenants: Tenants
    notice: Callable[[], None]  # there is a new batch of a file

    def wake_workers(self, models: Collection[str]) -> None:
        """Tell Redis that there is work. The jobs are safe in SQL, so a Redis that is down costs time only:
        the sweeper says it again. `wake` does not block, so neither does this."""
        for model in models:
            try:
                self.wake(model)
            except Exception as error:
                log.warning("api.wake_failed model=%.80a error=%s", model, type(error).__name__)

    async def wake_workers_later(self, models: Collection[str]) -> None:
        """The same as a background task; for a plain function each would take a thread."""
        self.wake_workers(models)

    def accepted(self, made: BaseModel, location: str, models: Collection[str]) -> JSONResponse:
        """The 202 of a submit: what it is now and where to ask for it. Workers hear of it when the answer is out."""
        return JSONResponse(
            made.model_dump(mode="json"),
            202,
            {"Location": location},
            background=BackgroundTask(self.wake_workers_later, models),
        )
