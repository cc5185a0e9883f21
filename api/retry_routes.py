"""Retry routes: jobs that failed or expired, handed in once more.

Owns the HTTP side: one optional field, `states`, the `Idempotency-Key`, and the answer, which is that of a submit.
What a retry is lies in `jobs.retries`.
"""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from api.auth import BEARER, By
from api.batch_objects import BatchObject
from api.body_limit import read_fields
from api.errors import not_found
from api.found import show_batch, show_job
from api.job_objects import JobObject
from api.parameters import is_id, refuse_query, submit_of
from api.schemas import REFUSALS
from api.services import Services
from jobs.bad_field import BadField
from jobs.idempotency import Submit
from jobs.retries import USUAL, parse_states
from jobs.states import JobState
from jobs.tenants import Owner

States = frozenset[JobState]


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1",
        dependencies=[Depends(BEARER), Depends(refuse_query)],
        responses=REFUSALS,
    )

    @router.post("/jobs/{job_id}/retry", status_code=202, response_model=JobObject, tags=["jobs"])
    async def retry_job(job_id: str, request: Request, caller: By) -> JSONResponse:
        """The job once more, as a new one, if it failed or expired or is in one of the body's `states`: `failed`,
        `expired`, `cancelled`. Otherwise 409. The same `Idempotency-Key` makes one retry."""
        states, submit = await _asked(services, request, job_id)
        return await run_in_threadpool(_retry_job, services, caller.owner, job_id, states, submit)

    @router.post("/batches/{batch_id}/retry", status_code=202, response_model=BatchObject, tags=["batches"])
    async def retry_batch(batch_id: str, request: Request, caller: By) -> JSONResponse:
        """A new batch of those jobs that failed or expired, or are in one of the body's `states`. 409 when there is
        none. The same `Idempotency-Key` makes one retry."""
        states, submit = await _asked(services, request, batch_id)
        return await run_in_threadpool(_retry_batch, services, caller.owner, batch_id, states, submit)

    return router


async def _asked(services: Services, request: Request, name: str) -> tuple[States, Submit | None]:
    fields = await read_fields(request, max_bytes=services.settings.max_body_bytes)
    for field in fields:
        if field != "states":
            raise BadField(field, "unknown field; only states is allowed", "unknown_parameter")
    states = parse_states(fields["states"]) if "states" in fields else USUAL
    return states, submit_of(request, {"retry_of": name, "states": sorted(states)})


def _retry_job(
    services: Services, owner: Owner, job_id: str, states: States, submit: Submit | None
) -> JSONResponse:
    made = services.retries.retry_job(job_id, owner, states=states, submit=submit) if is_id(job_id) else None
    if made is None:
        raise not_found("job", job_id)
    new_id, models = made
    return services.accepted(show_job(services, owner.tenant, new_id), f"/v1/jobs/{new_id}", models)


def _retry_batch(
    services: Services, owner: Owner, batch_id: str, states: States, submit: Submit | None
) -> JSONResponse:
    retry = services.retries.retry_batch
    made = retry(batch_id, owner, states=states, submit=submit) if is_id(batch_id) else None
    if made is None:
        raise not_found("batch", batch_id)
    new_id, models = made
    return services.accepted(show_batch(services, owner.tenant, new_id), f"/v1/batches/{new_id}", models)
