"""Completion routes: OpenAI's chat and text completions, answered while the client waits, whole or as a stream.

Owns the HTTP side. Each request is one job like any other, of the tier that goes first, that this process waits for
(`api.waits`); what a body may say is `jobs.openai_body`'s.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.auth import BEARER, By
from api.awaited import accept_awaited
from api.body_limit import read_object
from api.chunks import HEADERS, KEEP_ALIVE, MEDIA_TYPE, Chunks, event
from api.errors import NO_DATABASE, ApiError
from api.parameters import refuse_query, submit_of
from api.schemas import REFUSALS
from api.services import Services
from api.waits import DivergedError, Transcript, Wait, unless_client_leaves
from jobs.audience import Audience, Piece
from jobs.openai_answers import answer_id, completion_object, error_object, usage_object
from jobs.openai_body import CHAT, COMPLETIONS, Asked, Url, read_asked
from jobs.reads import JobView
from jobs.tenants import Owner
from jobs.terms import Tier

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
BEGIN_SECONDS = 15.0  # without a word for so long, the answer begins without one


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        tags=["completions"],
        dependencies=[Depends(BEARER), Depends(refuse_query)],
        responses=REFUSALS,
    )

    @router.post(CHAT)
    async def chat(request: Request, caller: By) -> Response:
        """OpenAI's chat completion; with `stream` as server-sent events."""
        return await _answer(services, request, caller.owner, CHAT)

    @router.post(COMPLETIONS)
    async def completion(request: Request, caller: By) -> Response:
        """OpenAI's text completion; with `stream` as server-sent events."""
        return await _answer(services, request, caller.owner, COMPLETIONS)

    return router


async def _answer(services: Services, request: Request, owner: Owner, url: Url) -> Response:
    data = await read_object(request, max_bytes=services.settings.max_body_bytes)
    asked = read_asked(url, data, services.settings, may_stream=True)
    submit = submit_of(request, {"url": url, "body": data})
    audience = Audience.TEXT if asked.stream else Audience.END
    job_id = await run_in_threadpool(
        accept_awaited, services, owner, asked.body, submit, audience, Tier.INTERACTIVE
    )
    # Who names its request can ask for its answer again.
    wait = services.waits.begin(job_id, owner.tenant, keep=asked.store or submit is not None)
    with ExitStack() as stack:
        stack.callback(wait.close)
        job = await wait.look()  # in the time that its worker needs to hear of it
        if not asked.stream:
            return JSONResponse(_whole(asked, await unless_client_leaves(request.receive, wait.end())))
        first = await unless_client_leaves(request.receive, wait.news(BEGIN_SECONDS))
        ended = await wait.result() if wait.ended else None  # an error is still an answer of its own
        stack.pop_all()
    return EventStream(_events(asked, wait, job, first, ended), wait)


def _whole(asked: Asked, job: JobView) -> dict[str, Any]:
    assert job.outputs is not None
    return completion_object(
        asked.url,
        job.outputs,
        answer_id=_answer_id(asked.url, job.id),
        created=int(job.created_at),
        model=job.model,
        usage=_usage(job),
    )


class EventStream(StreamingResponse):
    """Ends when the client leaves, and closes the wait however it ends."""

    def __init__(self, content: AsyncIterator[bytes], wait: Wait) -> None:
        super().__init__(content, headers=HEADERS, media_type=MEDIA_TYPE)
        self._wait = wait

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self.stream_response(send))
        finally:
            self._wait.close()


async def _events(
    asked: Asked, wait: Wait, job: JobView, first: list[Piece], ended: JobView | None
) -> AsyncIterator[bytes]:
    num_choices = asked.body.n or 1
    chunks = Chunks(
        url=asked.url,
        answer_id=_answer_id(asked.url, job.id),
        created=int(job.created_at),
        model=job.model,
        include_usage=asked.include_usage,
    )
    transcript = Transcript(num_choices)

    def say(pieces: list[Piece]) -> bytes:
        new = [(piece, transcript.take(piece)) for piece in pieces]
        return b"".join(
            (chunks.reasoning if piece.is_reasoning else chunks.text)(piece.sample, text)
            for piece, text in new
            if text
        )

    yield chunks.opening(num_choices) + say(first)
    try:
        while not wait.ended:
            pieces = await wait.news(KEEP_ALIVE_SECONDS)
            if said := say(pieces):
                yield said
            elif not pieces and not wait.ended:
                yield KEEP_ALIVE
        done = ended or await wait.result()
        yield _last_words(chunks, transcript, done)
    except ApiError as error:
        yield event(error_object(error.status, error.message, code=error.code, param=error.param))
    except DivergedError:
        log.error("completions.diverged job=%s", job.id)
        message = "the text sent so far is not that of the result: the request was interrupted and began anew"
        yield event(error_object(500, message, code="stream_diverged"))
    except NO_DATABASE as error:
        log.error("completions.database job=%s error=%s", job.id, type(error).__name__)
        message = "the database cannot be reached at the moment; try again"
        yield event(error_object(503, message, code="database_unreachable"))


def _last_words(chunks: Chunks, transcript: Transcript, job: JobView) -> bytes:
    """What of the result has not been sent, and how it ended."""
    assert job.outputs is not None
    said = b""
    for output in job.outputs:
        if rest := transcript.rest(output["index"], output.get("reasoning", ""), is_reasoning=True):
            said += chunks.reasoning(output["index"], rest)
        if rest := transcript.rest(output["index"], output["text"]):
            said += chunks.text(output["index"], rest)
        said += chunks.end(output)
    return said + chunks.closing(_usage(job))


def _usage(job: JobView) -> dict[str, Any]:
    assert job.usage is not None
    return usage_object(job.usage.prompt, job.usage.completion, job.usage.cached, job.outputs)


def _answer_id(url: Url, job_id: str) -> str:
    return answer_id(url, job_id.removeprefix("job_"))
