"""Batch routes: hand in a file, list, how far a batch is, and its cancel.

Owns the HTTP side of a batch, whether it came as a file (OpenAI's contract) or as an array; its results are
`api.result_routes`'s.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from api.auth import BEARER, By
from api.batch_objects import BatchList, BatchObject, batch_object
from api.body_limit import read_json, refuse_body
from api.errors import conflict, no_such_file, not_found
from api.found import find_batch, show_batch
from api.parameters import Seconds, is_id, refuse_query, refuse_repeats, submit_of
from api.schemas import REFUSALS
from api.services import Services
from jobs.batch_reads import BatchFilter
from jobs.file_batches import NoSuchFile, parse_wish
from jobs.idempotency import Submit
from jobs.reads import MAX_LIMIT
from jobs.states import BatchState
from jobs.tenants import Owner
from jobs.texts import Name


class BatchQuery(BaseModel):
    """The query string of GET /v1/batches; OpenAI's two and three of ours. Times in unix seconds."""

    model_config = ConfigDict(extra="forbid")

    after: Annotated[Name, Field(max_length=255)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = 20
    status: BatchState | None = None
    created_after: Seconds | None = None
    created_before: Seconds | None = None


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1/batches",
        tags=["batches"],
        dependencies=[Depends(BEARER)],
        responses=REFUSALS,
    )

    settings = services.settings

    @router.post("", dependencies=[Depends(refuse_query)])
    async def create_batch(request: Request, caller: By) -> BatchObject:
        """A batch of an uploaded file, which is checked afterwards. The same `Idempotency-Key` with the same body is
        accepted once and answered each time."""
        data = await read_json(request, max_bytes=settings.max_body_bytes)
        return await run_in_threadpool(_create, services, caller.owner, data, submit_of(request, data))

    @router.get("", dependencies=[Depends(refuse_repeats)])
    def list_batches(query: Annotated[BatchQuery, Query()], caller: By) -> BatchList:
        """A page of batches, newest first. `after` is the `last_id` of the page before."""
        only = BatchFilter(
            state=query.status, created_after=query.created_after, created_before=query.created_before
        )
        batches, has_more = services.batch_reads.page(
            only, tenant=caller.tenant, after=query.after, limit=query.limit
        )
        return BatchList.of([batch_object(batch) for batch in batches], has_more)

    @router.get("/{batch_id}", dependencies=[Depends(refuse_query)])
    def get_batch(batch_id: str, caller: By) -> BatchObject:
        return show_batch(services, caller.tenant, batch_id)

    @router.post("/{batch_id}/cancel", dependencies=[Depends(refuse_query)], response_model=BatchObject)
    async def cancel_batch(batch_id: str, request: Request, caller: By) -> BatchObject | JSONResponse:
        """Cancels all open jobs. `cancelling` until workers have let go of theirs and the output is written. Safe to
        repeat; a batch that ended otherwise is a 409."""
        await refuse_body(request, max_bytes=settings.max_body_bytes)
        return await run_in_threadpool(_cancel, services, caller.tenant, batch_id)

    return router


def _create(services: Services, owner: Owner, data: object, submit: Submit | None) -> BatchObject:
    try:
        wish = parse_wish(data)
        if not is_id(wish.input_file_id):
            raise NoSuchFile(wish.input_file_id)
        batch_id = services.file_batches.create(wish, owner, submit)
    except NoSuchFile as error:
        raise no_such_file(error.file_id, param="input_file_id") from None
    services.notice()
    return batch_object(find_batch(services, owner.tenant, batch_id))


def _cancel(services: Services, tenant: str, batch_id: str) -> BatchObject | JSONResponse:
    state = services.cancels.cancel_batch(batch_id, tenant=tenant) if is_id(batch_id) else None
    if state is None:
        raise not_found("batch", batch_id)
    if state in (BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED):
        return conflict(f"a batch that is {state} cannot be cancelled", code="batch_closed")
    services.notice()
    return batch_object(find_batch(services, tenant, batch_id))
