"""Requests: a job's body turned into what the engine is asked; the mirror of `answers`.

Owns the step from text to token ids, for jobs out of SQL and for lines of a batch file alike. Knows neither
SQL nor pipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from engine.reasoning import ReasoningFormat
from engine.request import Generated, Request, RequestId
from engine.tokenizer import Tokenizer
from jobs.body import JobBody
from jobs.settings import Settings

T = TypeVar("T")
R = TypeVar("R")


def prompt_of(body: JobBody, tokenizer: Tokenizer) -> list[int]:
    """Token ids. Raises ValueError for a chat that the checkpoint's template refuses."""
    if body.messages is None:
        return tokenizer.encode(body.prompt or "")
    messages = [{"role": message.role, "content": message.content} for message in body.messages]
    return tokenizer.encode_chat(messages, variables=body.chat_template_kwargs)


def prompts_of(bodies: Sequence[JobBody], tokenizer: Tokenizer) -> list[list[int]]:
    """The same of several bodies, whose plain texts are encoded in one go. Raises as `prompt_of` does, without saying
    whose fault it is."""
    texts = iter(tokenizer.encode_all([body.prompt or "" for body in bodies if body.messages is None]))
    return [next(texts) if body.messages is None else prompt_of(body, tokenizer) for body in bodies]


def all_or_each(make: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R | BaseException]:
    """What `make` makes of `items`; where it fails, what it makes of each by itself, or why it cannot."""
    try:
        return [*make(items)]
    except BaseException as error:  # a tokenizer may raise anything, Rust panics included
        if len(items) == 1:
            return [error]
    return [all_or_each(make, [item])[0] for item in items]


def request_of(
    request_id: RequestId,
    body: JobBody,
    prompt: Sequence[int],
    *,
    seed: int,
    settings: Settings,
    tenant: str,
    priority: int = 0,
    turn: float | None = None,
    generated: tuple[Generated, ...] = (),
    stream: bool = False,
    reasoning: ReasoningFormat | None = None,
) -> Request:
    """Prefixes are shared inside a tenant only. `prompt`: as `prompt_of` made it. `priority`, `turn`: as in
    `Request`. `generated`: a checkpoint. `stream`: tell of its tokens as they are made. `reasoning`: how this model
    marks what it thinks, which it does in chats; what follows a plain prompt is one text. Raises
    `InvalidParameter`."""
    sampling = body.sampling(settings.default_max_tokens, settings.max_n)
    return Request(
        id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=sampling.seeded(seed),
        cache_salt=tenant,
        priority=priority,
        turn=turn,
        generated=generated,
        stream=stream,
        begins="answer" if reasoning is None or body.messages is None else reasoning.begins(prompt),
    )
