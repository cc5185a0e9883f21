"""Batch files: OpenAI's batch lines in, OpenAI's batch output lines out.

Owns the two formats (`{"custom_id", "method", "url", "body"}` and `{"id", "custom_id", "response", "error"}`).
Refuses to know engines: it makes a `JobBody` of a line and a line of an answer.
"""

from __future__ import annotations

import codecs
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.openai_answers import answer_id, completion_object, error_object
from jobs.openai_body import CHAT, COMPLETIONS, Url, read_asked
from jobs.settings import Settings
from jobs.strict_json import BadJson, parse

ENDPOINTS: Final = (CHAT, COMPLETIONS)
_LINE_FIELDS: Final = ("custom_id", "method", "url", "body")
OUTPUT_START: Final = b'{"id": "batch_req_'  # of every line that we write


class BadLine(ValueError):
    """One line that is not a request. `code` and `param` as in the errors of OpenAI's batch object; `custom_id`: the
    line has one all the same."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_request",
        param: str | None = None,
        custom_id: str | None = None,
    ) -> None:
        self.code = code
        self.param = param
        self.custom_id = custom_id
        super().__init__(f"{param}: {message}" if param else message)


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of the input. `number` counts lines from 1."""

    number: int
    custom_id: str
    url: Url
    body: dict[str, Any]

    def job(self, settings: Settings) -> JobBody:
        """What the engine is asked for. The body's `model` gives way to the one that is run. Raises `BadField`."""
        given = {name: value for name, value in self.body.items() if name != "model"}
        return read_asked(self.url, given, settings, may_stream=False).body

    def named_job(self, settings: Settings, *, checked: bool = False) -> JobBody:
        """The same with the line's own model, which must be there, and its custom_id. `checked`: this very line has
        been through here before. Raises `BadField`."""
        if self.body.get("model") is None:
            raise BadField("model", "is required", "missing_required_parameter")
        return read_asked(
            self.url, self.body, settings, may_stream=False, custom_id=self.custom_id, checked=checked
        ).body


def parse_line(number: int, raw: bytes, endpoint: str | None = None) -> BatchLine:
    """`endpoint`: the only url that is allowed; None: any that we know. Raises `BadLine`."""
    if number == 1:  # editors write a byte order mark
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        data = parse(raw)
    except BadJson as error:
        raise BadLine(str(error), code="invalid_json_line") from None
    if not isinstance(data, dict):
        raise BadLine("is not a JSON object", code="invalid_json_line")
    custom_id, body = data.get("custom_id"), data.get("body")
    url: Any = data.get("url")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("must be a non-empty string", param="custom_id")
    if not custom_id.isascii() and any("\ud800" <= character <= "\udfff" for character in custom_id):
        raise BadLine("must be valid Unicode, without lone surrogates", param="custom_id")
    known = {"custom_id": custom_id}
    if data.get("method", "POST") != "POST":
        raise BadLine("must be POST", param="method", **known)
    if url not in (ENDPOINTS if endpoint is None else (endpoint,)):
        allowed = endpoint or " or ".join(ENDPOINTS)
        raise BadLine(f"must be {allowed}", code="url_mismatch", param="url", **known)
    if not isinstance(body, dict):
        raise BadLine("must be an object", param="body", **known)
    if unknown := data.keys() - set(_LINE_FIELDS):
        raise BadLine(
            f"unknown field; there are {', '.join(_LINE_FIELDS)}",
            param=ascii(min(unknown))[1:-1][:80],
            **known,
        )
    return BatchLine(number, custom_id, url, body)


def bounded_lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Every line from where `file` is, with its end; None for one of more than `max_bytes`, which is never in memory
    whole."""
    while line := file.readline(max_bytes + 1):
        rest = line
        while len(rest) > max_bytes and not rest.endswith(b"\n"):
            rest = file.readline(max_bytes + 1)
        yield line if rest is line else None


def is_blank(raw: bytes) -> bool:
    """Whether a line says nothing."""
    return not raw.removeprefix(codecs.BOM_UTF8).strip()


# --- output lines -------------------------------------------------------------------------------------------


def answer_line(line: BatchLine, model: str, outputs: list[dict[str, Any]], usage: dict[str, Any]) -> bytes:
    """`outputs` and `usage` as `jobs.openai_answers` takes them."""
    body = completion_object(
        line.url,
        outputs,
        answer_id=answer_id(line.url, secrets.token_hex(12)),
        created=int(time.time()),
        model=model,
        usage=usage,
    )
    return output_line(secrets.token_hex(12), line.custom_id, response(secrets.token_hex(12), 200, body))


def error_line(line: BatchLine, status: int, message: str, *, code: str, param: str | None = None) -> bytes:
    """A request that failed, as the API would have answered it."""
    body = error_object(status, message, code=code, param=param)
    return output_line(secrets.token_hex(12), line.custom_id, response(secrets.token_hex(12), status, body))


def bad_line(number: int, error: BadLine) -> bytes:
    """A line that is no request; `line` is its number in the input, where it has no custom_id to answer under."""
    told = {"code": error.code, "message": f"line {number}: {error}", "line": number}
    return output_line(secrets.token_hex(12), error.custom_id, None, told)


def response(name: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{name}", "body": body}


def output_line(
    name: str,
    custom_id: str | None,
    response: dict[str, Any] | None,
    error: dict[str, Any] | None = None,
) -> bytes:
    """`name`: the part of the id behind `batch_req_`."""
    made = {"id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": error}
    # ASCII, because some readers of lines also break them at U+2028 and its like.
    return json.dumps(made, ensure_ascii=True).encode() + b"\n"
