"""Upload: a multipart body becomes a file on disk while it arrives, never a value in memory.

Owns the reading of OpenAI's form: the parts `purpose`, `expires_after[anchor]`, `expires_after[seconds]` and `file`,
in any order, each once. Bounded are the whole body, the file, every field, the headers of every part, and the time.
Refuses to know tenants and quotas; what it was given comes back with the file still unfinished
(`jobs.file_store.Part`).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from api.body_limit import refuse_compressed
from api.errors import ApiError
from jobs.bad_field import BadField
from jobs.file_store import FileStore, Part
from jobs.files import MAX_FILENAME_CHARS, check_life, check_purpose

FORM_BYTES: Final = 65_536  # of a body beside its file
MAX_FIELD_BYTES: Final = 1_024
IDLE_SECONDS: Final = 60.0  # without a byte
WHOLE_SECONDS: Final = 3_000.0  # less than `jobs.files.LEFTOVER_SECONDS`
WRITE_BYTES: Final = 1 << 20
ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS: Final = frozenset({"purpose", ANCHOR, SECONDS})


@dataclass(frozen=True, slots=True)
class Upload:
    """`part` holds all bytes of the file and is the caller's to keep or drop. `seconds`: its life, None: no end."""

    part: Part
    filename: str
    seconds: int | None


async def receive(request: Request, store: FileStore, *, max_bytes: int) -> Upload:
    """Raises `ApiError` (400, 403, 408, 413, 415, 507), `BadField`, and `ClientDisconnect`; then nothing stays on
    disk."""
    _refuse_web_pages(request)
    form = _Form(_boundary(request), max_bytes)
    part = store.begin()  # in no thread: one that is cancelled meanwhile would leave it to nobody
    try:
        async with asyncio.timeout(WHOLE_SECONDS), asyncio.timeout(IDLE_SECONDS) as idle:
            async for chunk in request.stream():
                idle.reschedule(asyncio.get_running_loop().time() + IDLE_SECONDS)
                form.feed(chunk)
                if len(form.pending) >= WRITE_BYTES:
                    await run_in_threadpool(part.write, form.take_pending())
        await run_in_threadpool(part.write, form.take_pending())
        return form.finish(part)
    except BaseException as error:
        part.drop()
        if isinstance(error, TimeoutError):
            message = "the body took too long to arrive"
            raise ApiError(408, message, code="request_timeout") from None
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space() from None
        raise


def no_space() -> ApiError:
    headers = {"x-should-retry": "false"}
    return ApiError(507, "the server's disk is full", code="storage_full", headers=headers)


def announced_bytes(request: Request) -> int:
    """Of the file, at least, as far as the client says."""
    length = request.headers.get("content-length", "")
    return max(0, int(length) - FORM_BYTES) if length.isdigit() and len(length) < 20 else 0


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the file is too large: at most {limit} bytes are allowed", code="file_too_large")


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"the body is not a valid multipart form: {why}", code="invalid_multipart")


def _refuse_web_pages(request: Request) -> None:
    """Browsers let any page send forms anywhere, without asking first as they do for JSON; but they say whose page it
    is."""
    origin = request.headers.get("origin")
    try:
        same = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    except ValueError:  # half an IPv6 address
        same = False
    if not same:
        message = "forms from web pages of another origin are not accepted"
        raise ApiError(403, message, code="cross_origin", param="origin")


def _boundary(request: Request) -> bytes:
    refuse_compressed(request)
    media, options = parse_options_header(request.headers.get("content-type", ""))
    if media != b"multipart/form-data":
        message = "the content-type must be multipart/form-data"
        raise ApiError(415, message, code="unsupported_media_type", param="content-type")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise _malformed("its content-type names no boundary of 1 to 70 characters")
    return boundary


@dataclass(slots=True)
class _Headers:
    """Of the part that is being read."""

    name: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""


class _Form:
    """What the push parser calls. `pending`: bytes of the file that are not written yet."""

    def __init__(self, boundary: bytes, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = self._num_file_bytes = 0
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._headers = _Headers()
        self._current = ""  # the part's name
        self._value = bytearray()
        self._ended = False
        self.pending = bytearray()
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._part_begins,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._part_ends,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def feed(self, chunk: bytes) -> None:
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes + FORM_BYTES:
            raise _too_large(self._max_bytes)
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise _malformed(str(error)[:200]) from None

    def take_pending(self) -> bytes:
        taken = bytes(self.pending)
        self.pending.clear()
        return taken

    def finish(self, part: Part) -> Upload:
        if not self._ended:
            raise _malformed("it ends before its last boundary")
        if "purpose" not in self._fields:
            raise BadField("purpose", "is required", "missing_required_parameter")
        if self._filename is None:
            raise BadField("file", "is required", "missing_required_parameter")
        seconds: int | None = None
        if ANCHOR in self._fields or SECONDS in self._fields:
            text = self._fields.get(SECONDS, "")
            number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
            seconds = check_life(self._fields.get(ANCHOR), number)
        return Upload(part, self._filename, seconds)

    # --- the parser's calls ---------------------------------------------------------------------------------

    def _part_begins(self) -> None:
        self._headers = _Headers()
        self._value.clear()
        self._current = ""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._headers.name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers.value += data[start:end]

    def _header_ends(self) -> None:
        if bytes(self._headers.name).lower() == b"content-disposition":
            self._headers.disposition = bytes(self._headers.value)
        self._headers.name.clear()
        self._headers.value.clear()

    def _headers_end(self) -> None:
        kind, options = parse_options_header(self._headers.disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")[:80]
        if kind != b"form-data" or not name:
            raise _malformed("a part has no name")
        if name == "file":
            if self._filename is not None:
                raise BadField("file", "is given twice")
            if b"filename" not in options:
                raise BadField("file", "must be sent as a file, with a filename")
            given = options[b"filename"].decode("utf-8", "replace").replace("\x00", "\ufffd")
            if len(given) > MAX_FILENAME_CHARS:
                raise BadField("file", f"its filename has more than {MAX_FILENAME_CHARS} characters")
            self._filename = given
        elif name not in _FIELDS:
            raise BadField(
                name, "unknown field; there are purpose, expires_after and file", "unknown_parameter"
            )
        elif name in self._fields:
            raise BadField(name, "is given twice")
        self._current = name

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._current == "file":
            self._num_file_bytes += end - start
            if self._num_file_bytes > self._max_bytes:
                raise _too_large(self._max_bytes)
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise BadField(self._current, f"has more than {MAX_FIELD_BYTES} bytes")

    def _part_ends(self) -> None:
        if self._current == "file":
            return
        self._fields[self._current] = self._value.decode("utf-8", "replace")
        if self._current == "purpose":
            check_purpose(self._fields["purpose"])  # before the rest has come in vain

    def _end(self) -> None:
        self._ended = True
