"""The HTTP application: routes, errors and the life of what they share.

Owns the assembly and nothing else. No torch, no model, no tokenizer in this process: what it must know of
them it reads from the workers table.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api import (
    batch_routes,
    completion_routes,
    errors,
    file_routes,
    health_routes,
    job_routes,
    metrics,
    model_routes,
    response_routes,
    result_routes,
    retry_routes,
    schedule_routes,
    usage_routes,
)
from api.auth import Gate
from api.head import HeadAsGet
from api.metrics import ApiMetrics, CountRequests
from api.openapi import Application
from api.services import Services, Wake
from api.waits import Waits
from jobs.batch_reads import BatchReads
from jobs.cancels import Cancels
from jobs.completion_order import CompletionOrder
from jobs.database import Database
from jobs.file_batches import FileBatches
from jobs.files import Files
from jobs.forecasts import Forecasts
from jobs.intake import Intake
from jobs.keys import Keys
from jobs.listeners import Listeners
from jobs.queue_metrics import QueueMetrics
from jobs.reads import Reads
from jobs.retries import Retries
from jobs.schedule_runs import ScheduleRuns
from jobs.schedules import Schedules
from jobs.settings import Settings
from jobs.tenants import Tenants
from jobs.usage import Usages

log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    database: Database | None = None,
    wake: Wake | None = None,
    notice: Callable[[], None] | None = None,
) -> FastAPI:
    """The ASGI application. A `database` that is given stays the caller's to close. `wake(model)`
    is called after each commit of new jobs; without it, workers find them at their next sweep. `notice()` is called
    after each new batch of a file; without it, clerks find it at their next look."""
    owned = database is None
    store = Database(settings.database) if database is None else database
    services = _services(settings, store, wake or _nobody, notice or _no_clerk)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await services.waits.close()
        if owned:
            store.close()

    app = Application(
        title="Nightpress",
        description="Bulk text generation: hand in jobs, ask how far they are, fetch what came out.",
        docs_url=None,  # its page loads scripts from elsewhere; /openapi.json is enough
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.waits = services.waits  # for whoever stops the process
    app.add_middleware(HeadAsGet)
    app.add_middleware(Gate, keys=Keys(store))
    errors.install(app)  # around the gate, whose refusals have request ids too
    openai = (completion_routes, response_routes, model_routes)
    own = (job_routes, batch_routes, file_routes, result_routes, retry_routes, schedule_routes, usage_routes)
    for noun in (*own, *openai, health_routes):
        app.include_router(noun.routes(services))
    counted = ApiMetrics(QueueMetrics(store, settings.served_model))
    app.include_router(metrics.routes(counted))
    app.add_middleware(CountRequests, metrics=counted)  # around everything, so the last to be added
    return app


def _services(settings: Settings, store: Database, wake: Wake, notice: Callable[[], None]) -> Services:
    files = Files(store, settings)
    forecasts = Forecasts(store, settings)
    intake = Intake(store, settings, forecasts)
    reads, cancels = Reads(store), Cancels(store)
    return Services(
        settings=settings,
        intake=intake,
        forecasts=forecasts,
        reads=reads,
        cancels=cancels,
        waits=Waits(Listeners(settings.redis, reads), reads, cancels, settings.interactive_seconds),
        schedules=Schedules(store, settings),
        runs=ScheduleRuns(store, intake),
        wake=wake,
        order=CompletionOrder(store),
        retries=Retries(store, settings),
        usages=Usages(store),
        tenants=Tenants(store),
        files=files,
        file_batches=FileBatches(store, settings, files.store),
        batch_reads=BatchReads(store),
        notice=notice,
    )


def _nobody(model: str) -> None:
    log.debug("api.no_broker model=%.80a", model)


def _no_clerk() -> None:
    log.debug("api.no_clerk")
