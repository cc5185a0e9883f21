"""Batch routes: how far a batch is, what came out of it, and its cancel.

Owns the HTTP side of a batch. Results are streamed as JSON lines, one finished job after another in input
order, also while the batch runs; no more than a chunk of them is ever in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from api.body_limit import refuse_body
from api.errors import not_found
from api.schemas import BatchObject, ErrorObject, batch_object, job_object
from api.services import Services, is_id, refuse_query
from jobs.reads import BatchView

_SEND_BYTES = 65_536  # lines are sent in pieces of about this size


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1/batches",
        tags=["batches"],
        dependencies=[Depends(refuse_query)],
        responses={"4XX": {"model": ErrorObject}},
    )

    @router.get("/{batch_id}")
    def get_batch(batch_id: str) -> BatchObject:
        return batch_object(_batch(services, batch_id))

    @router.get("/{batch_id}/results", response_class=StreamingResponse)
    def get_results(batch_id: str) -> StreamingResponse:
        """One line per finished job. `X-Incomplete: true` while jobs are open, so that more will follow."""
        headers = {} if _batch(services, batch_id).closed else {"X-Incomplete": "true"}
        return StreamingResponse(_lines(services, batch_id), headers=headers, media_type="application/jsonl")

    @router.post("/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, request: Request) -> BatchObject:
        """Cancels all open jobs. `cancelling` until workers have let go of theirs."""
        await refuse_body(request, max_bytes=services.settings.max_body_bytes)
        return await run_in_threadpool(_cancel, services, batch_id)

    return router


def _lines(services: Services, batch_id: str) -> Iterator[bytes]:
    piece = bytearray()
    for job in services.reads.results(batch_id):
        # ASCII, because some readers of lines also break them at U+2028 and its like.
        piece += json.dumps(job_object(job).model_dump(mode="json"), ensure_ascii=True).encode() + b"\n"
        if len(piece) >= _SEND_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def _cancel(services: Services, batch_id: str) -> BatchObject:
    if not is_id(batch_id) or services.cancels.cancel_batch(batch_id) is None:
        raise not_found("batch", batch_id)
    return batch_object(_batch(services, batch_id))


def _batch(services: Services, batch_id: str) -> BatchView:
    batch = services.reads.batch(batch_id) if is_id(batch_id) else None
    if batch is None:
        raise not_found("batch", batch_id)
    return batch
