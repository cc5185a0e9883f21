"""Body limits: a JSON body is bounded while it arrives, and understood strictly.

Owns the bytes between the socket and a Python value: sizes, media type, encoding, and the JSON that RFC 8259
leaves open (`jobs.strict_json`). Refuses to know what a job is, save for one word: a body whose `jobs` has not shown
up within the limit of a single job cannot be an array and is not read further.
"""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api.errors import ApiError, shown_name
from jobs import strict_json
from jobs.bad_field import BadField

SMALL_BYTES = 16_384  # of JSON that takes a fraction of a millisecond
READ_SECONDS = 300.0  # for a whole body, so that a slow sender does not hold its bytes for ever


async def read_json(request: Request, *, max_bytes: int, max_array_bytes: int | None = None) -> Any:
    """The body as a Python value. A top-level object with `jobs` may have `max_array_bytes`, if that is given, others
    `max_bytes`. Raises `ApiError` 400, 408, 413 or 415."""
    _refuse_media(request)
    max_array_bytes = max_bytes if max_array_bytes is None else max_array_bytes
    raw = await _read(request, max_bytes, max_array_bytes)
    # Off the event loop if it is large: 64 MB of JSON take a second.
    small = len(raw) <= SMALL_BYTES
    data = parse_json(raw) if small else await run_in_threadpool(parse_json, raw)
    if len(raw) > max_bytes and not (isinstance(data, dict) and "jobs" in data):
        _too_large(max_bytes)
    return data


async def read_object(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """The same for a body that must be an object. Raises `BadField`, too."""
    data = await read_json(request, max_bytes=max_bytes)
    if not isinstance(data, dict):
        raise BadField(None, "the body must be a JSON object", "invalid_type")
    return data


async def refuse_body(request: Request, *, max_bytes: int) -> None:
    """For routes that take no fields: an empty body or `{}`."""
    for name in await read_fields(request, max_bytes=max_bytes):
        shown = shown_name(name)
        raise ApiError(400, f"{shown}: this route takes no fields", code="unknown_parameter", param=shown)


async def read_fields(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """The fields of a body that may as well be left out. Raises `ApiError` 400, 408 or 413."""
    raw = await _read(request, max_bytes, max_bytes)
    if not raw.strip():
        return {}
    data = parse_json(raw)
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be empty or an object", code="invalid_type")
    return data


async def _read(request: Request, max_bytes: int, max_array_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_array_bytes:
        _too_large(max_array_bytes)
    raw = bytearray()
    array = False
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                raw += chunk
                if not array and len(raw) > max_bytes:
                    array = b'"jobs"' in raw[:max_bytes]
                    if not array:
                        _too_large(max_bytes)
                if len(raw) > max_array_bytes:
                    _too_large(max_array_bytes)
    except TimeoutError:
        raise ApiError(408, "the body took too long to arrive", code="request_timeout") from None
    return bytes(raw)


def _too_large(limit: int) -> NoReturn:
    raise ApiError(413, f"the body is too large: at most {limit} bytes are allowed", code="body_too_large")


def refuse_compressed(request: Request) -> None:
    """A few bytes of them could be gigabytes. Raises `ApiError` 415."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = "compressed bodies are not accepted"
        raise ApiError(415, message, code="unsupported_encoding", param="content-encoding")


def _refuse_media(request: Request) -> None:
    refuse_compressed(request)
    # Also what keeps a web page from posting here: browsers ask first before they send this type.
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != "application/json":
        message = "the content-type must be application/json"
        raise ApiError(415, message, code="unsupported_media_type", param="content-type")


def parse_json(raw: bytes) -> Any:
    """Strict JSON in strict UTF-8. Raises `ApiError` 400."""
    try:
        return strict_json.parse(raw)
    except strict_json.BadJson as error:
        raise ApiError(400, f"the body {error}", code="invalid_json") from None
