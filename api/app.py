"""The HTTP application: routes, errors and the life of what they share.

Owns the assembly and nothing else. No torch, no model, no tokenizer in this process: what it must know of
them it reads from the workers table.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api import batch_routes, errors, health_routes, job_routes
from api.services import Services, Wake
from jobs.cancels import Cancels
from jobs.database import Database
from jobs.intake import Intake
from jobs.reads import Reads
from jobs.settings import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings, database: Database | None = None, wake: Wake | None = None) -> FastAPI:
    """The ASGI application. A `database` that is given stays the caller's to close. `wake(model, num_jobs)`
    is called after each commit of new jobs; without it, workers find them at their next sweep."""
    owned = database is None
    store = Database(settings.database) if database is None else database
    services = Services(
        settings=settings,
        intake=Intake(store, settings),
        reads=Reads(store),
        cancels=Cancels(store),
        wake=wake or _nobody,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if owned:
            store.close()

    app = FastAPI(
        title="Nightpress",
        description="Bulk text generation: hand in jobs, ask how far they are, fetch what came out.",
        docs_url=None,  # its page loads scripts from elsewhere; /openapi.json is enough
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    errors.install(app)
    for noun in (job_routes, batch_routes, health_routes):
        app.include_router(noun.routes(services))
    return app


def _nobody(model: str, num_jobs: int) -> None:
    log.debug("api.no_broker model=%s jobs=%d", model, num_jobs)
