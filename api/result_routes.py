"""Result routes: what came out of a batch, as JSON lines, also while it runs.

Owns two ways to read it. Without parameters all that has ended is streamed in input order. With a cursor it comes in
pages, in input order or in the order of completion; only the latter never leaves a job behind the cursor. No more
than a chunk of results is ever in memory, for the end of a page is looked up before its lines are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from api.auth import BEARER, By
from api.errors import not_found
from api.found import find_batch
from api.job_objects import job_object
from api.parameters import is_id, refuse_repeats
from api.schemas import REFUSALS
from api.services import Services
from jobs.completion_order import MAX_PAGE, Order, Page

_SEND_BYTES = 65_536  # lines are sent in pieces of about this size


class ResultQuery(BaseModel):
    """The query string of GET /v1/batches/{id}/results. `after`: the `X-Next` of the page before."""

    model_config = ConfigDict(extra="forbid")

    order: Order = Order.INPUT
    after: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = None


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1/batches",
        tags=["batches"],
        dependencies=[Depends(BEARER)],
        responses=REFUSALS,
    )

    @router.get(
        "/{batch_id}/results", response_class=StreamingResponse, dependencies=[Depends(refuse_repeats)]
    )
    def get_results(batch_id: str, query: Annotated[ResultQuery, Query()], caller: By) -> StreamingResponse:
        """One line per ended job. `X-Incomplete: true`: more will follow, now or later. With `order=completion`,
        `after` or `limit` (at most 1,000, which is also what is meant without it) one page; its header `X-Next` is
        the `after` of the following one, and the same as before when nothing new has ended."""
        tenant, order = caller.tenant, query.order
        if order is Order.INPUT and query.after is None and query.limit is None:
            headers = {} if find_batch(services, tenant, batch_id).closed else {"X-Incomplete": "true"}
            return _stream(_lines(services, tenant, batch_id), headers)
        page = (
            services.order.page(
                batch_id, tenant=tenant, order=order, after=query.after, limit=query.limit or MAX_PAGE
            )
            if is_id(batch_id)
            else None
        )
        if page is None:
            raise not_found("batch", batch_id)
        headers = {"X-Next": str(page.last)}
        if page.has_more or not page.closed:
            headers["X-Incomplete"] = "true"
        return _stream(_lines(services, tenant, batch_id, order, page), headers)

    return router


def _stream(lines: Iterator[bytes], headers: dict[str, str]) -> StreamingResponse:
    return StreamingResponse(lines, headers=headers, media_type="application/jsonl")


def _lines(
    services: Services, tenant: str, batch_id: str, order: Order = Order.INPUT, page: Page | None = None
) -> Iterator[bytes]:
    jobs = services.reads.results(
        batch_id,
        tenant=tenant,
        order=order,
        after=None if page is None else page.after,
        last=None if page is None else page.last,
    )
    piece = bytearray()
    for job in jobs:
        # ASCII, because some readers of lines also break them at U+2028 and its like.
        piece += json.dumps(job_object(job).model_dump(mode="json"), ensure_ascii=True).encode() + b"\n"
        if len(piece) >= _SEND_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)
