"""Drafts: what of a job's row follows from its body alone, and a place on disk for those of a whole file.

Owns the estimate, the opening's number and the wording of the body, once per job: the check of a batch's file needs
them for the tenant's room, and the insertion, which comes next in the same process, would have to parse every line
again to get them. A `DraftFile` has no name, so it goes with its process; whoever takes the batch over reads the
lines themselves. Refuses to know ids, owners and doors (`jobs.job_rows`).
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterator, Sequence
from itertools import chain
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO, Any, Final, NamedTuple

from engine import codec
from engine.request import derive_seed
from jobs.body import JobBody
from jobs.json_text import JsonText
from jobs.settings import Settings

log = logging.getLogger(__name__)

BYTES_PER_TOKEN: Final = 4  # of UTF-8, about right for English; nobody here has a tokenizer for every model
PREFIX_CHARS: Final = 256
MEMORY_BYTES: Final = 1 << 18  # fewer never go to disk
_HEAD: Final = struct.Struct("<Q")  # of a frame: its bytes


class Draft(NamedTuple):
    """Columns of `models.Job`. `seed`: None when the job's id is to give it."""

    custom_id: str | None
    model: str
    body: JsonText
    metadata: dict[str, str]
    seed: int | None
    estimated_tokens: int
    num_samples: int
    prefix_group: int


class Drafts(NamedTuple):
    """Some drafts in their order, by column, in which they are read, written and inserted at a fraction of the time.
    `ends`: the byte of the batch's file at which each one's line ends."""

    ends: Sequence[int]
    custom_ids: Sequence[str | None]
    models: Sequence[str]
    bodies: Sequence[JsonText]
    metadata: Sequence[dict[str, str]]
    seeds: Sequence[int | None]
    estimated_tokens: Sequence[int]
    num_samples: Sequence[int]
    prefix_groups: Sequence[int]

    def part(self, start: int, stop: int) -> Drafts:
        columns: Any = (column[start:stop] for column in self)
        return Drafts(*columns)

    def packed(self) -> bytes:
        """As `DraftFile` takes them."""
        return codec.pack(tuple(self))


def by_column(drafts: Sequence[tuple[int, Draft]]) -> Drafts:
    """At least one, each with the byte at which its line ends."""
    columns: Any = zip(*((end, *draft) for end, draft in drafts), strict=True)
    return Drafts(*columns)


def joined(parts: Sequence[Drafts]) -> Drafts:
    """At least one."""
    if len(parts) == 1:
        return parts[0]
    columns: Any = (tuple(chain.from_iterable(column)) for column in zip(*parts, strict=True))
    return Drafts(*columns)


def prefix_group(model: str, opening: str) -> int:
    """The same 63-bit number for jobs that start with the same text, on every machine and in every run."""
    return derive_seed("prefix", model, opening[:PREFIX_CHARS])


def estimate_tokens(body: JobBody, settings: Settings) -> int:
    """Prompt bytes over `BYTES_PER_TOKEN`, plus the most that all samples may generate."""
    texts = [body.prompt or ""] if body.messages is None else [one.content for one in body.messages]
    prompt = math.ceil(sum(len(text.encode()) for text in texts) / BYTES_PER_TOKEN)
    return prompt + body.length_limit(settings.default_max_tokens) * (body.n or 1)


def draft_of(body: JobBody, settings: Settings) -> Draft:
    """Raises ValueError when `body` names no model yet."""
    if body.model is None:
        raise ValueError("a job needs a model before it can be stored")
    return Draft(
        body.custom_id,
        body.model,
        body.written(),
        body.metadata or {},
        body.seed,
        estimate_tokens(body, settings),
        body.n or 1,
        prefix_group(body.model, body.opening),
    )


class DraftFile:
    """Drafts in their order. First all go in, then `finish`, then they come out, in any thread but one at a time."""

    def __init__(self, folder: str) -> None:
        """`folder`: where it may lie, once it is too long for memory."""
        self._file: IO[bytes] = SpooledTemporaryFile(MEMORY_BYTES, dir=folder)  # noqa: SIM115 - close
        self._lost = False
        self.whole = False

    def add(self, frame: bytes) -> None:
        """What `Drafts.packed` made. A disk that has no room for it makes the rest slower, and harms nothing."""
        if self._lost:
            return
        try:
            self._file.write(_HEAD.pack(len(frame)) + frame)
            self._file.flush()  # here, where it may fail
        except OSError as error:
            log.warning("drafts.lost error=%s", type(error).__name__)
            self._lost = True
            self.close()

    def finish(self) -> None:
        """No more are to come; `whole` says whether all are there."""
        self.whole = not self._lost

    def __iter__(self) -> Iterator[Drafts]:
        """As many at a time as were added. Raises `OSError`."""
        self._file.seek(0)
        while head := self._file.read(_HEAD.size):
            drafts = Drafts(*codec.unpack(self._file.read(*_HEAD.unpack(head))))
            yield drafts._replace(bodies=[JsonText(body) for body in drafts.bodies])

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:  # a full disk may refuse the last bytes once more
            pass

    def __enter__(self) -> DraftFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
