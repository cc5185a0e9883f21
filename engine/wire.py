"""Wire: the frames between a worker and its engine process.

Owns the messages and their frames: a 4-byte big-endian length, then one msgpack array `[kind, fields]`.
Refuses to know who sends what when (`process`, `jobs.engine_process`) and how a dataclass is told from bytes
(`codec`): what arrives can only become one of the frozen dataclasses below, so a broken peer is a clear
`WireError` and never a strange object three calls later. No torch: the worker imports this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from engine import codec
from engine.config import EngineConfig
from engine.growth import Growth
from engine.request import Completion, Rejected, Request, RequestId

MAX_FRAME_BYTES = 256 * 2**20  # 128 samples of 131,072 tokens at 5 bytes each, three times over
_LENGTH_BYTES = 4
_TOKEN_BYTES = 5
_OUTPUT_BYTES = 2**11  # of one sample besides its tokens: a stop string has at most 256 characters
_COMPLETION_BYTES = 2**14  # of one answer besides its samples


class WireError(ValueError):
    """The peer sent bytes that are not a frame of ours, or stopped in the middle of one."""


class FrameTooLargeError(WireError):
    """A message does not fit into `MAX_FRAME_BYTES`; senders of lists may halve the list."""


# --- worker to engine ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configure:
    """The first frame: how the engine is to be run, and how often it tells what requests have made (`Grown`);
    None: never."""

    config: EngineConfig
    checkpoint_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Add:
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Ids that are already gone are passed over. Each live one is answered by a Completion with `aborted`."""

    ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Abort everything, send what is left to send, exit 0."""


# --- engine to worker ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The engine is loaded. `credits`: the number of requests that may be unanswered at any time."""

    model: str  # as configured
    pid: int
    max_model_len: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    credits: int
    vocab_size: int
    device: str
    dtype: str
    kernels: str
    deterministic: bool
    versions: dict[str, str] = field(default_factory=dict)
    load_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Completions:
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens generated so far, per request over all its samples. At most one a second; lossy."""

    num_generated: dict[RequestId, int]


@dataclass(frozen=True, slots=True)
class Grown:
    """What requests have made since the last such frame. Put together they are checkpoints, so none is left out."""

    growths: tuple[Growth, ...]


@dataclass(frozen=True, slots=True)
class Streamed:
    """New tokens of requests with `stream` (`engine.Engine.streamed`), soon after the steps that made them."""

    growths: tuple[Growth, ...]


@dataclass(frozen=True, slots=True)
class Stats:
    """`engine.Engine.stats()`; about once a second while busy, and when the engine turns idle or busy."""

    values: dict[str, int | float]


@dataclass(frozen=True, slots=True)
class Fatal:
    """The engine cannot go on and exits with code 1. In phase `start` it never said Hello."""

    reason: str
    phase: Literal["start", "run"]


ToEngine: TypeAlias = Configure | Add | Abort | Stop
FromEngine: TypeAlias = Hello | Completions | Progress | Grown | Streamed | Stats | Fatal
Message: TypeAlias = ToEngine | FromEngine

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        *(Configure, Add, Abort, Stop),
        *(Hello, Completions, Progress, Grown, Streamed, Stats, Fatal),
    )
}


# --- bytes --------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """One frame, its length in front. Raises `FrameTooLargeError`."""
    body = codec.pack([type(message).__name__, message])
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLargeError(
            f"{type(message).__name__} takes {len(body)} bytes, at most {MAX_FRAME_BYTES} are allowed"
        )
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


def decode(body: bytes) -> Message:
    """The message in a frame's body. Raises `WireError` naming the field that is wrong."""
    try:
        value = codec.unpack(body)
        if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], str):
            raise WireError("a frame must be [kind, fields]")
        if value[0] not in _KINDS:
            raise WireError(f"unknown message {value[0][:40]!r}, expected one of {', '.join(_KINDS)}")
        return codec.build(_KINDS[value[0]], value[1])
    except codec.DecodeError as error:
        raise WireError(str(error)) from error


def check_answer_fits(request: Request, max_tokens: int) -> None:
    """Raises `Rejected` when the answer to `request`, with at most `max_tokens` tokens per sample, could be too
    long for a frame. Every length below is the most that msgpack takes."""
    sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
    per_token = _TOKEN_BYTES + _logprobs_bytes(sampling.logprobs)
    size = sampling.n * (_OUTPUT_BYTES + max_tokens * per_token) + _COMPLETION_BYTES
    size += num_prompt * _logprobs_bytes(sampling.prompt_logprobs)
    if size > MAX_FRAME_BYTES:
        raise Rejected(
            "invalid_request",
            f"{sampling.n} samples of up to {max_tokens} tokens behind a prompt of {num_prompt}, with logprobs "
            f"{sampling.logprobs} and prompt_logprobs {sampling.prompt_logprobs}, could take {size} bytes; an answer "
            f"may have {MAX_FRAME_BYTES}: ask for less of n, max_tokens, logprobs or prompt_logprobs",
        )


def _logprobs_bytes(count: int | None) -> int:
    """Of one `TokenLogprobs` with the `count` likeliest tokens: a map of three names with their values."""
    if count is None:
        return 0
    token_id, logprob, top = (1 + 8) + 5, (1 + 7) + 9, (1 + 3) + 3 + count * (1 + 5 + 9)
    return 1 + token_id + logprob + top


class FrameReader:
    """Blocking reads of whole messages from a file descriptor, which it owns from then on."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "rb", buffering=1 << 16)

    def read(self) -> Message | None:
        """The next message, or None at a clean end. Raises `WireError`."""
        head = self._file.read(_LENGTH_BYTES)
        if not head:
            return None
        length = int.from_bytes(head, "big")
        if len(head) < _LENGTH_BYTES or length > MAX_FRAME_BYTES:
            raise WireError(f"a frame of {length} bytes is announced, at most {MAX_FRAME_BYTES} are allowed")
        body = self._file.read(length)
        if len(body) < length:
            raise WireError(f"the peer stopped after {len(body)} of {length} bytes of a frame")
        return decode(body)

    def close(self) -> None:
        self._file.close()


class FrameWriter:
    """Blocking writes of whole messages; one thread at a time. Owns the file descriptor."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "wb", buffering=0)

    def write(self, message: Message) -> None:
        """Raises `FrameTooLargeError` before a byte is sent, and OSError when the peer is gone."""
        rest = memoryview(encode(message))
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()
