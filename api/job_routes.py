"""Job routes: hand in one job or many, ask for one or a page of them, cancel one.

Owns the HTTP side of a job; what a job may say is `jobs.body`'s, what is done with it `jobs.intake`'s. A 202
is sent after the commit, and the wake-up of workers after the 202.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from api.auth import BEARER, By
from api.batch_objects import BatchObject
from api.body_limit import read_json, refuse_body
from api.errors import not_found
from api.found import show_batch, show_job
from api.job_objects import JobList, JobObject, job_object
from api.parameters import Seconds, is_id, refuse_query, refuse_repeats, submit_of
from api.schemas import REFUSALS
from api.services import Services
from jobs.bad_field import BadField
from jobs.body import parse_job, parse_jobs, parse_metadata
from jobs.idempotency import Submit
from jobs.keyset import Direction
from jobs.reads import MAX_LIMIT, JobFilter, JobView
from jobs.states import JobState
from jobs.tenants import Owner
from jobs.terms import ORDINARY
from jobs.terms_body import TERM_FIELDS, refuse_terms_inside, split_terms
from jobs.texts import CustomId, ModelName, Name


class JobQuery(BaseModel):
    """The query string of GET /v1/jobs. Times in unix seconds."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    after: Annotated[Name, Field(max_length=255)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = 20
    order: Direction = "desc"
    status: JobState | None = None
    batch_id: Annotated[Name, Field(max_length=255)] | None = None
    model: ModelName | None = None
    custom_id: CustomId | None = None
    created_after: Seconds | None = None
    created_before: Seconds | None = None


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1/jobs",
        tags=["jobs"],
        dependencies=[Depends(BEARER)],
        responses=REFUSALS,
    )
    settings = services.settings

    @router.post(
        "", status_code=202, response_model=JobObject | BatchObject, dependencies=[Depends(refuse_query)]
    )
    async def submit(request: Request, caller: By) -> JSONResponse:
        """One job, or `{"jobs": […]}` for a batch that keeps the order. The same `Idempotency-Key` with the same body
        is accepted once and answered each time."""
        data = await read_json(
            request, max_bytes=settings.max_body_bytes, max_array_bytes=settings.max_array_bytes
        )
        work = _submit_batch if isinstance(data, dict) and "jobs" in data else _submit_job
        return await run_in_threadpool(work, services, caller.owner, data, submit_of(request, data))

    @router.get("", dependencies=[Depends(refuse_repeats)])
    def list_jobs(query: Annotated[JobQuery, Query()], caller: By) -> JobList:
        """A page of jobs, newest first. `after` is the `last_id` of the page before."""
        only = JobFilter(
            state=query.status,
            batch_id=query.batch_id,
            model=query.model,
            custom_id=query.custom_id,
            created_after=query.created_after,
            created_before=query.created_before,
        )
        jobs, has_more = services.reads.jobs(
            only, tenant=caller.tenant, after=query.after, limit=query.limit, direction=query.order
        )
        return JobList.of([_object(services, job) for job in jobs], has_more)

    @router.get("/{job_id}", dependencies=[Depends(refuse_query)])
    def get_job(job_id: str, caller: By) -> JobObject:
        return show_job(services, caller.tenant, job_id)

    @router.post("/{job_id}/cancel", dependencies=[Depends(refuse_query)])
    async def cancel_job(job_id: str, request: Request, caller: By) -> JobObject:
        """A queued job is cancelled at once, a running one within a step of its engine and one renewal of its
        worker's lease. An ended job stays as it is."""
        await refuse_body(request, max_bytes=settings.max_body_bytes)
        return await run_in_threadpool(_cancel, services, caller.tenant, job_id)

    return router


def _submit_job(services: Services, owner: Owner, data: object, submit: Submit | None) -> JSONResponse:
    if (known := services.intake.accepted_before(submit, owner)) is not None:
        return services.accepted(show_job(services, owner.tenant, known), f"/v1/jobs/{known}", ())
    terms = ORDINARY
    if isinstance(data, dict):
        terms, data = split_terms(data, clock=services.intake.clock)
    (body,) = services.intake.name_models([parse_job(data, services.settings, forms=True)])
    if submit is None:
        made = _object(services, services.intake.accept_new(body, owner, terms=terms))
    else:
        made = show_job(services, owner.tenant, services.intake.accept_one(body, owner, submit, terms=terms))
    return services.accepted(made, f"/v1/jobs/{made.id}", [str(body.model)])


def _submit_batch(
    services: Services, owner: Owner, data: dict[str, Any], submit: Submit | None
) -> JSONResponse:
    if (known := services.intake.accepted_before(submit, owner)) is not None:
        return services.accepted(show_batch(services, owner.tenant, known), f"/v1/batches/{known}", ())
    terms, data = split_terms(data, clock=services.intake.clock)
    for name in data:
        if name not in ("jobs", "metadata"):
            allowed = ", ".join(("metadata", *TERM_FIELDS))
            raise BadField(
                name, f"unknown field; beside jobs only these are allowed: {allowed}", "unknown_parameter"
            )
    metadata = parse_metadata(data.get("metadata"))
    refuse_terms_inside(data["jobs"])
    bodies = services.intake.name_models(parse_jobs(data["jobs"], services.settings))
    batch_id = services.intake.accept_many(bodies, owner, metadata, submit, terms)
    return services.accepted(
        show_batch(services, owner.tenant, batch_id),
        f"/v1/batches/{batch_id}",
        {str(body.model) for body in bodies},
    )


def _cancel(services: Services, tenant: str, job_id: str) -> JobObject:
    if not is_id(job_id) or services.cancels.cancel_job(job_id, tenant=tenant) is None:
        raise not_found("job", job_id)
    return show_job(services, tenant, job_id)


def _object(services: Services, job: JobView) -> JobObject:
    return job_object(job, services.forecasts.of_job(job))
