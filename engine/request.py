"""The words that cross the door between jobs and engine: what is asked for and what came out.

Owns `Request`, `Completion`, what they hold, and the refusal of a whole request. Knows nothing of text, SQL, tensors
or time: a request is token ids in, a completion is token ids out. Standard library only, because the API, the
worker and the command line all import it and none of them may load torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "repetition"]
# how a sample begins (`reasoning`): within a reasoning, with one or without as its first token says, or as answer
Begins = Literal["answer", "undecided", "reasoning"]
_FIELD = re.compile(r"([a-z_]+(?:\.[a-z_]+)*): ")


class Rejected(ValueError):
    """A whole request cannot run on this engine (too long for the model, or for the KV memory).

    `code` is stable and machine readable; the message says what is allowed.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RequestId(NamedTuple):
    """Who asked: the job and the fence of the claim. A stale fence makes a stale answer recognisable."""

    job_id: str
    fence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What one sample had made when it was interrupted: a resumed request goes on behind it.

    `logprobs`: one per token if the request asks for them, else nothing. `prompt_logprobs`: only in the first
    sample of a request that asks for them: of the prompt's tokens from the second on, as far as they are known,
    which is all of them as soon as it has a token."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A job as the engine sees it. `sampling.seed` is always set here (`derive_seed`).

    `cache_salt`: only requests with the same salt share computed prefixes, so that response times tell nobody
    what others have asked. `priority`: lower runs first, and preempts higher ones; `turn`: among equals
    lower runs first, and None comes last; in whatever the caller counts turns. It preempts, once, those of another
    salt that are at least two turns later (`making_way`). `generated`: a checkpoint, one entry per sample, or
    nothing. `stream`: somebody reads along, so its tokens are told of as they are made (`wire.Streamed`).
    `begins`: stop strings and a form are for the answer, not for the reasoning before it.
    """

    id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    priority: int = 0
    turn: float | None = None
    generated: tuple[Generated, ...] = ()
    stream: bool = False
    begins: Begins = "answer"


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything with a stable `str`: sample k of seed s is `derive_seed(s, k)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely one token was behind those before it: natural logarithms of the softmax over the raw logits.

    Raw: before min_tokens, temperature and filters (vLLM's `raw_logprobs`). Values are those of a float32. `top`
    holds (token id, logprob) of the `SamplingParams.logprobs` (of a prompt's token: `prompt_logprobs`) likeliest
    tokens, descending, ties by the lower id; the token itself need not be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One sample of a completion.

    `token_ids` are exact and are what is billed. `text_cut`, when a stop string was met, is the number of
    characters of the answer's decoded text that belong to it; `last_is_silent`: the token that ended it adds nothing
    to the text. `stop_reason` is the stop string or stop token
    id that ended it; None for end of sequence, `length` and `repetition`. `logprobs` has one entry per token of
    `token_ids`; None when they were not asked for. `begins`: as the request said.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    text_cut: int | None = None
    last_is_silent: bool = False
    logprobs: tuple[TokenLogprobs, ...] | None = None
    begins: Begins = "answer"

    @property
    def shown_ids(self) -> tuple[int, ...]:
        """The tokens that a text is made of."""
        return self.token_ids[:-1] if self.last_is_silent else self.token_ids

    def text(self, decode: Callable[[tuple[int, ...]], str]) -> str:
        """What the user reads of a sample that is all answer, by the tokenizer's `decode`."""
        return decode(self.shown_ids)[: self.text_cut]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestError:
    """Why one request failed. `code`: `numerics`, `context_length_exceeded`, `kv_capacity_exceeded`,
    `invalid_request`, `grammar_error`, `invalid_checkpoint` (`Request.generated` does not fit; without it the request
    may run). A message about one field begins with its name and a colon."""

    code: str
    message: str

    @property
    def param(self) -> str | None:
        """The field at fault, if it is one."""
        found = _FIELD.match(self.message)
        return None if found is None else found[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one request: `n` outputs, or an error, or the tokens made before an abort.

    `num_generated` counts every generated token of all samples, the discarded surplus after a stop string
    excluded, so that an aborted or failed request can still be booked. `prompt_logprobs` has one entry per token of
    the prompt, None for the first, which nothing comes before; None when they were not asked for.
    `generated`: what an aborted one has made, to go on from (`Request.generated`).
    """

    id: RequestId
    outputs: tuple[Output, ...] = ()
    error: RequestError | None = None
    aborted: bool = False
    generated: tuple[Generated, ...] = ()
    num_prompt: int = 0
    num_generated: int = 0
    num_cached_tokens: int = field(default=0)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
