"""Requests: a job's body turned into what the engine is asked; the mirror of `answers`.

Owns the step from text to token ids, for jobs out of SQL and for lines of a batch file alike. Knows neither
SQL nor pipes.
"""

from __future__ import annotations

from engine.request import Generated, Request, RequestId
from engine.tokenizer import Tokenizer
from jobs.body import JobBody
from jobs.settings import Settings


def request_of(
    request_id: RequestId,
    body: JobBody,
    *,
    seed: int,
    tokenizer: Tokenizer,
    settings: Settings,
    tenant: str,
    priority: int = 0,
    turn: float | None = None,
    generated: tuple[Generated, ...] = (),
    stream: bool = False,
) -> Request:
    """Prefixes are shared inside a tenant only. `priority`, `turn`: as in `Request`. `generated`: a checkpoint.
    `stream`: tell of its tokens as they are made.

    Raises `InvalidParameter`, or another ValueError for a chat that the checkpoint's template refuses."""
    if body.messages is not None:
        messages = [{"role": message.role, "content": message.content} for message in body.messages]
        ids = tokenizer.encode_chat(messages)
    else:
        ids = tokenizer.encode(body.prompt or "")
    sampling = body.sampling(settings.default_max_tokens, settings.max_n)
    return Request(
        id=request_id,
        prompt_token_ids=tuple(ids),
        sampling=sampling.seeded(seed),
        cache_salt=tenant,
        priority=priority,
        turn=turn,
        generated=generated,
        stream=stream,
    )
