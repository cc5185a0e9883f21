"""Health routes: whether this process lives, and whether the service gets work done.

`/health` asks nobody. `/ready` asks the workers table: a database that cannot be reached, or work of a model that no
live worker of it moves forward, is a 503 with the reason (`jobs.readiness`).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from api.errors import ApiError
from api.parameters import refuse_query
from api.schemas import REFUSALS
from api.services import Services


def routes(services: Services) -> APIRouter:
    router = APIRouter(tags=["health"], dependencies=[Depends(refuse_query)], responses=REFUSALS)

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready")
    def ready() -> JSONResponse:
        """`workers` counts live ones by state, `models` are those that loaded, moving workers serve."""
        readiness = services.reads.readiness(services.settings.stall_seconds)
        if not readiness.ready:
            raise ApiError(503, str(readiness.reason), code="not_ready")
        body: dict[str, Any] = {
            "status": "ready",
            "has_work": readiness.has_work,
            "workers": {str(state): count for state, count in readiness.num_workers.items()},
            "models": list(readiness.models),
        }
        return JSONResponse(body)

    return router
