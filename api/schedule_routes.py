"""Schedule routes: make, change, list, delete schedules; run one by hand; see what became of its times.

Owns the HTTP side of a schedule; what it may say is `jobs.schedule_body`'s. A body that holds `jobs` may be as
large as that of POST /v1/jobs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NoReturn

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from api.auth import BEARER, By
from api.body_limit import read_json, refuse_body
from api.errors import not_found
from api.parameters import is_id, refuse_query, refuse_repeats, submit_of
from api.schedule_objects import (
    RunList,
    RunObject,
    ScheduleList,
    ScheduleObject,
    run_object,
    schedule_object,
)
from api.schemas import REFUSALS
from api.services import Services
from jobs.idempotency import Submit
from jobs.reads import MAX_LIMIT
from jobs.schedule_body import parse_change, parse_schedule
from jobs.tenants import Owner
from jobs.texts import Name


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PageQuery(_Query):
    after: Annotated[Name, Field(max_length=255)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = 20


class ListQuery(PageQuery):
    name: Annotated[Name, Field(max_length=255)] | None = None


class GetQuery(_Query):
    include: Literal["jobs"] | None = None


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1/schedules",
        tags=["schedules"],
        dependencies=[Depends(BEARER)],
        responses=REFUSALS,
    )
    settings = services.settings

    async def body_of(request: Request) -> Any:
        return await read_json(
            request, max_bytes=settings.max_body_bytes, max_array_bytes=settings.max_array_bytes
        )

    @router.post("", status_code=201, dependencies=[Depends(refuse_query)])
    async def create(request: Request, response: Response, caller: By) -> ScheduleObject:
        """`jobs` and `metadata` as in POST /v1/jobs, beside `name`, `cron` and `time_zone`."""
        made = await run_in_threadpool(_create, services, caller.owner, await body_of(request))
        response.headers["Location"] = f"/v1/schedules/{made.id}"
        return made

    @router.get("", dependencies=[Depends(refuse_repeats)])
    def list_schedules(query: Annotated[ListQuery, Query()], caller: By) -> ScheduleList:
        """A page of schedules, newest first. `after` is the `last_id` of the page before."""
        found, has_more = services.schedules.page(
            tenant=caller.tenant, name=query.name, after=query.after, limit=query.limit
        )
        return ScheduleList.of([schedule_object(one) for one in found], has_more)

    @router.get("/{schedule_id}", dependencies=[Depends(refuse_repeats)])
    def get(schedule_id: str, query: Annotated[GetQuery, Query()], caller: By) -> ScheduleObject:
        """Also one that has been deleted, for the sake of its runs. Its jobs only with `include=jobs`."""
        found = services.schedules.get(schedule_id, tenant=caller.tenant) if is_id(schedule_id) else None
        if found is None:
            _missing(schedule_id)
        jobs = None
        if query.include == "jobs":
            jobs = services.schedules.jobs(schedule_id, tenant=caller.tenant)
        return schedule_object(found, jobs)

    @router.patch("/{schedule_id}", dependencies=[Depends(refuse_query)])
    async def change(schedule_id: str, request: Request, caller: By) -> ScheduleObject:
        """Changes what is given. Runs that have started go on as they are."""
        data = await body_of(request)
        return await run_in_threadpool(_change, services, caller.tenant, schedule_id, data)

    @router.delete("/{schedule_id}", dependencies=[Depends(refuse_query)])
    async def delete(schedule_id: str, request: Request, caller: By) -> ScheduleObject:
        """Fires no more. Runs and batches stay, and what runs goes on."""
        await refuse_body(request, max_bytes=settings.max_body_bytes)
        return await run_in_threadpool(_delete, services, caller.tenant, schedule_id)

    @router.post(
        "/{schedule_id}/run",
        status_code=202,
        response_model=RunObject,
        dependencies=[Depends(refuse_query)],
    )
    async def run(schedule_id: str, request: Request, caller: By) -> JSONResponse:
        """Hands the jobs in now, whatever the clock says. The same `Idempotency-Key` does it once."""
        await refuse_body(request, max_bytes=settings.max_body_bytes)
        submit = submit_of(request, ["run", schedule_id])
        return await run_in_threadpool(_run, services, caller.owner, schedule_id, submit)

    @router.get("/{schedule_id}/runs", dependencies=[Depends(refuse_repeats)])
    def runs(schedule_id: str, query: Annotated[PageQuery, Query()], caller: By) -> RunList:
        """A page of runs, latest first, also of a deleted schedule."""
        if not is_id(schedule_id) or services.schedules.get(schedule_id, tenant=caller.tenant) is None:
            _missing(schedule_id)
        found, has_more = services.runs.page(
            schedule_id, tenant=caller.tenant, after=query.after, limit=query.limit
        )
        return RunList.of([run_object(one) for one in found], has_more)

    return router


def _create(services: Services, owner: Owner, data: object) -> ScheduleObject:
    fields = parse_schedule(data, services.settings)
    services.intake.name_models(fields["jobs"])  # only asked: at each run a job takes the model of that day
    return schedule_object(services.schedules.create(fields, owner))


def _change(services: Services, tenant: str, schedule_id: str, data: object) -> ScheduleObject:
    fields = parse_change(data, services.settings)
    services.intake.name_models(fields.get("jobs", []))
    changed = services.schedules.change(schedule_id, fields, tenant=tenant) if is_id(schedule_id) else None
    return _missing(schedule_id) if changed is None else schedule_object(changed)


def _delete(services: Services, tenant: str, schedule_id: str) -> ScheduleObject:
    deleted = services.schedules.delete(schedule_id, tenant=tenant) if is_id(schedule_id) else None
    return _missing(schedule_id) if deleted is None else schedule_object(deleted)


def _run(services: Services, owner: Owner, schedule_id: str, submit: Submit | None) -> JSONResponse:
    started = services.runs.start(schedule_id, owner, submit) if is_id(schedule_id) else None
    if started is None:
        _missing(schedule_id)
    models = started.batch.models if started.batch else ()
    return services.accepted(run_object(started.run), f"/v1/batches/{started.run.batch_id}", models)


def _missing(schedule_id: str) -> NoReturn:
    raise not_found("schedule", schedule_id)
