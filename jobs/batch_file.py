"""Batch files: OpenAI's batch lines in, OpenAI's batch output lines out.

Owns the two formats (`{"custom_id", "method", "url", "body"}` and `{"id", "custom_id", "response", "error"}`),
and the rule that an output file which was cut short can be gone on with: what has a whole line is done. Refuses
to know engines: it makes a `JobBody` of a line and a line of an answer.
"""

from __future__ import annotations

import codecs
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.openai_answers import answer_id, completion_object, error_object
from jobs.openai_body import CHAT, COMPLETIONS, Url, read_asked
from jobs.settings import Settings
from jobs.strict_json import BadJson, parse

ENDPOINTS: Final = (CHAT, COMPLETIONS)
MAX_SHOWN = 10  # of many mistakes

_LINE_FIELDS: Final = ("custom_id", "method", "url", "body")
_OUR_START = b'{"id": "batch_req_'  # of every line that we write


class BatchFileError(ValueError):
    """A file that cannot be used at all; the message says why."""


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


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not is_blank(raw):
                yield number, raw


def check_input(path: Path) -> int:
    """How many lines the input has. Raises `BatchFileError` when two requests share a custom_id, because
    then no answer could be told from the other."""
    seen: dict[str, int] = {}
    twice: list[str] = []
    count = 0
    for number, raw in read_lines(path):
        count += 1
        try:
            custom_id = parse_line(number, raw).custom_id
        except BadLine as error:
            if error.custom_id is None:
                continue
            custom_id = error.custom_id
        if custom_id in seen:
            twice.append(f"lines {seen[custom_id]} and {number}: {custom_id[:80]!r}")
        else:
            seen[custom_id] = number
    if twice:
        more = f"\n  and {len(twice) - MAX_SHOWN} more" if len(twice) > MAX_SHOWN else ""
        raise BatchFileError(f"{path} uses a custom_id twice:\n  " + "\n  ".join(twice[:MAX_SHOWN]) + more)
    return count


@dataclass(slots=True)
class Done:
    """What an output file already holds."""

    custom_ids: set[str] = field(default_factory=set)
    bad_lines: set[int] = field(default_factory=set)  # of the input without a custom_id, by number
    num_failed: int = 0

    def __len__(self) -> int:
        return len(self.custom_ids) + len(self.bad_lines)


def _foreign(path: Path, number: int) -> BatchFileError:
    return BatchFileError(f"{path} line {number} is not a line of batch output; name another file")


def resume(path: Path) -> Done:
    """Read an output file and cut off a last line that a crash left unfinished. Raises `BatchFileError` for a
    file that is not ours to append to."""
    done = Done()
    if not path.exists():
        return done
    whole = 0
    with path.open("rb+") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                if raw[: len(_OUR_START)] != _OUR_START[: len(raw)]:
                    raise _foreign(path, number)
                break
            whole += len(raw)
            try:
                data = json.loads(raw)
                custom_id, response, error = data["custom_id"], data["response"], data["error"]
                if custom_id is None:
                    done.bad_lines.add(int(error["line"]))
                else:
                    done.custom_ids.add(str(custom_id))
                done.num_failed += response is None or response["status_code"] != 200
            except (ValueError, KeyError, TypeError):
                raise _foreign(path, number) from None
        file.truncate(whole)
    return done


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
