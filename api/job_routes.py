"""Job routes: hand in one job or many, ask for one or a page of them, cancel one.

Owns the HTTP side of a job; what a job may say is `jobs.body`'s, what is done with it `jobs.intake`'s. A 202
is sent after the commit, and the wake-up of workers after the 202.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from api.body_limit import read_json, refuse_body
from api.errors import ApiError, not_found
from api.schemas import ErrorObject, JobList, JobObject, batch_object, job_list, job_object
from api.services import Services, is_id, refuse_query
from jobs.body import BadField, CustomId, JobBody, ModelName, Name, parse_job, parse_metadata
from jobs.reads import MAX_LIMIT, JobFilter
from jobs.states import JobState

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class JobQuery(BaseModel):
    """The query string of GET /v1/jobs. Times in unix seconds."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    after: Annotated[Name, Field(max_length=255)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = 20
    order: Literal["asc", "desc"] = "desc"
    status: JobState | None = None
    batch_id: Annotated[Name, Field(max_length=255)] | None = None
    model: ModelName | None = None
    custom_id: CustomId | None = None
    created_after: Seconds | None = None
    created_before: Seconds | None = None


def routes(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses={"4XX": {"model": ErrorObject}})
    settings = services.settings

    @router.post("", status_code=202, dependencies=[Depends(refuse_query)])
    async def submit(request: Request) -> JSONResponse:
        """One job, or `{"jobs": […]}` for a batch that keeps the order."""
        data = await read_json(
            request, max_bytes=settings.max_body_bytes, max_array_bytes=settings.max_array_bytes
        )
        work = _submit_batch if isinstance(data, dict) and "jobs" in data else _submit_job
        return await run_in_threadpool(work, services, data)

    @router.get("")
    def list_jobs(query: Annotated[JobQuery, Query()], request: Request) -> JobList:
        """A page of jobs, newest first. `after` is the `last_id` of the page before."""
        for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
            if times > 1:
                raise ApiError(400, f"{name}: is given {times} times", code="invalid_value", param=name)
        only = JobFilter(
            state=query.status,
            batch_id=query.batch_id,
            model=query.model,
            custom_id=query.custom_id,
            created_after=query.created_after,
            created_before=query.created_before,
        )
        jobs, has_more = services.reads.jobs(only, after=query.after, limit=query.limit, order=query.order)
        return job_list(jobs, has_more)

    @router.get("/{job_id}", dependencies=[Depends(refuse_query)])
    def get_job(job_id: str) -> JobObject:
        return _job(services, job_id)

    @router.post("/{job_id}/cancel", dependencies=[Depends(refuse_query)])
    async def cancel_job(job_id: str, request: Request) -> JobObject:
        """A queued job is cancelled at once, a running one within a step of its engine and one renewal of its
        worker's lease. An ended job stays as it is."""
        await refuse_body(request, max_bytes=settings.max_body_bytes)
        return await run_in_threadpool(_cancel, services, job_id)

    return router


def _submit_job(services: Services, data: object) -> JSONResponse:
    (body,) = services.intake.name_models([parse_job(data, services.settings)])
    job_id = services.intake.accept_one(body)
    return JSONResponse(
        _job(services, job_id).model_dump(mode="json"),
        202,
        {"Location": f"/v1/jobs/{job_id}"},
        background=BackgroundTask(services.wake_workers, Counter([str(body.model)])),
    )


def _submit_batch(services: Services, data: dict[str, Any]) -> JSONResponse:
    for name in data:
        if name not in ("jobs", "metadata"):
            raise BadField(name, "unknown field; beside jobs only metadata is allowed", "unknown_parameter")
    metadata = parse_metadata(data.get("metadata"))
    bodies = _parse_jobs(data["jobs"], services)
    batch_id = services.intake.accept_many(bodies, metadata)
    batch = services.reads.batch(batch_id)
    assert batch is not None  # it has just been committed, and batches are never deleted
    return JSONResponse(
        batch_object(batch).model_dump(mode="json"),
        202,
        {"Location": f"/v1/batches/{batch_id}"},
        background=BackgroundTask(services.wake_workers, Counter(str(body.model) for body in bodies)),
    )


def _parse_jobs(jobs: object, services: Services) -> list[JobBody]:
    settings = services.settings
    if not isinstance(jobs, list):
        raise BadField("jobs", "must be an array of jobs", "invalid_type")
    if not 1 <= len(jobs) <= settings.max_array_jobs:
        raise BadField("jobs", f"must hold 1 to {settings.max_array_jobs} jobs, got {len(jobs)}")
    bodies: list[JobBody] = []
    for index, one in enumerate(jobs):
        try:
            bodies.append(parse_job(one, settings))
        except BadField as error:
            raise error.inside(f"jobs[{index}]") from None
    return services.intake.name_models(bodies)


def _cancel(services: Services, job_id: str) -> JobObject:
    if not is_id(job_id) or services.cancels.cancel_job(job_id) is None:
        raise not_found("job", job_id)
    return _job(services, job_id)


def _job(services: Services, job_id: str) -> JobObject:
    job = services.reads.job(job_id) if is_id(job_id) else None
    if job is None:
        raise not_found("job", job_id)
    return job_object(job)
