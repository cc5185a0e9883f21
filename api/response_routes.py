"""Response routes: one text over OpenAI's Responses API, in the background or while the client waits.

Owns the HTTP side. A response is a job of ours under another name; what a body may say is `jobs.responses_body`'s.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from api.auth import BEARER, By
from api.awaited import accept_awaited
from api.body_limit import read_object, refuse_body
from api.errors import ApiError
from api.parameters import is_id, refuse_query, submit_of
from api.response_object import id_of, job_id_of, response_object
from api.schemas import REFUSALS
from api.services import Services
from api.waits import unless_client_leaves
from jobs.audience import Audience
from jobs.responses_body import field_of, read_response
from jobs.terms import Tier

ROUTE = "/v1/responses"


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix=ROUTE,
        tags=["responses"],
        dependencies=[Depends(BEARER), Depends(refuse_query)],
        responses=REFUSALS,
    )

    @router.post("")
    async def create(request: Request, caller: By) -> JSONResponse:
        """With `background` it is answered at once, as `queued`; else when it is done."""
        data = await read_object(request, max_bytes=services.settings.max_body_bytes)
        asked = read_response(data, services.settings)
        submit = submit_of(request, {"url": ROUTE, "body": data})
        audience, tier = (
            (Audience.NOBODY, Tier.NORMAL) if asked.background else (Audience.END, Tier.INTERACTIVE)
        )
        job_id = await run_in_threadpool(
            accept_awaited, services, caller.owner, asked.body, submit, audience, tier
        )
        if not asked.background:
            wait = services.waits.begin(job_id, caller.tenant, keep=asked.store or submit is not None)
            try:
                await wait.look()
                await unless_client_leaves(request.receive, wait.end())
            except ApiError as error:
                error.param = field_of(error.param)
                raise
            finally:
                wait.close()
        return JSONResponse(await run_in_threadpool(_response, services, caller.tenant, job_id))

    @router.get("/{response_id}")
    def get_response(response_id: str, caller: By) -> JSONResponse:
        """How far it is, and its text once it is done."""
        return JSONResponse(_response(services, caller.tenant, _job_id(response_id)))

    @router.post("/{response_id}/cancel")
    async def cancel_response(response_id: str, request: Request, caller: By) -> JSONResponse:
        """What has ended stays as it is."""
        await refuse_body(request, max_bytes=services.settings.max_body_bytes)
        job_id = _job_id(response_id)
        if await run_in_threadpool(services.cancels.cancel_job, job_id, tenant=caller.tenant) is None:
            raise _unknown(response_id)
        return JSONResponse(await run_in_threadpool(_response, services, caller.tenant, job_id))

    return router


def _response(services: Services, tenant: str, job_id: str) -> dict[str, Any]:
    job = services.reads.job(job_id, tenant=tenant)
    body = services.reads.body(job_id, tenant=tenant)
    if job is None or body is None:
        raise _unknown(id_of(job_id))
    return response_object(job, body)


def _job_id(response_id: str) -> str:
    job_id = job_id_of(response_id)
    if job_id is None or not is_id(job_id):
        raise _unknown(response_id)
    return job_id


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"there is no response {name[:80]!a}", code="not_found", param="response_id")
