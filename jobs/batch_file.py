"""Batch files: OpenAI's batch lines in, OpenAI's batch output lines out.

Owns the two formats (`{"custom_id", "method", "url", "body"}` and `{"id", "custom_id", "response", "error"}`),
and the rule that an output file which was cut short can be gone on with: what has a whole line is done. Refuses
to know engines: it makes a `JobBody` of a line and a line of an answer.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jobs.body import NOT_SUPPORTED_YET, BadField, JobBody, parse_job
from jobs.settings import Settings

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MAX_SHOWN = 10  # of many mistakes

# OpenAI's fields that change nothing here, and values of others that mean "off".
IGNORED = frozenset({"user", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
OFF: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "logprobs": (False,),
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
}

_OUR_START = b'{"id": "batch_req_'  # of every line that we write


class BatchFileError(ValueError):
    """A file that cannot be used at all; the message says why."""


class BadLine(ValueError):
    """One line that is not a request. It costs an error line, the others go on."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of the input. `number` counts lines from 1."""

    number: int
    custom_id: str
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]

    def job(self, settings: Settings) -> JobBody:
        """What the engine is asked for. The body's `model` gives way to the one that is run. Raises `BadField`."""
        given = {
            name: value
            for name, value in self.body.items()
            if name not in IGNORED and name != "model" and not _is_off(name, value)
        }
        other = "prompt" if self.url == CHAT else "messages"
        for name in (other, "custom_id"):
            if name in given:
                raise BadField(name, f"is not a field of {self.url}", "unknown_parameter")
        return parse_job(given, settings)


def _is_off(name: str, value: object) -> bool:
    off = any(
        value == known and isinstance(value, bool) == isinstance(known, bool) for known in OFF.get(name, ())
    )
    return off or (value is None and name in NOT_SUPPORTED_YET)


def parse_line(number: int, raw: bytes) -> BatchLine:
    """Raises `BadLine`."""
    try:
        data = json.loads(
            raw.decode("utf-8-sig" if number == 1 else "utf-8")
        )  # editors write a byte order mark
    except UnicodeDecodeError:
        raise BadLine("is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadLine(f"is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadLine("is not a JSON object")
    custom_id, url, body = data.get("custom_id"), data.get("url"), data.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadLine("custom_id: must be a non-empty string")
    if any("\ud800" <= character <= "\udfff" for character in custom_id):
        raise BadLine("custom_id: must be valid Unicode, without lone surrogates")
    if data.get("method", "POST") != "POST":
        raise BadLine("method: must be POST")
    if url not in (CHAT, COMPLETIONS):
        raise BadLine(f"url: must be {CHAT} or {COMPLETIONS}")
    if not isinstance(body, dict):
        raise BadLine("body: must be an object")
    if unknown := data.keys() - {"custom_id", "method", "url", "body"}:
        raise BadLine(f"{ascii(min(unknown))[:80]}: unknown field")
    return BatchLine(number, custom_id, url, body)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
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
        except BadLine:
            continue
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
    bad_lines: set[int] = field(default_factory=set)  # of the input, by number
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
    """`outputs` as `jobs.outcomes.Outcome` has them: index, text, finish_reason, stop_reason."""
    chat = line.url == CHAT
    choices = []
    for output in outputs:
        text = output["text"]
        choice = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        )
        choices.append(
            {
                "index": output["index"],
                **choice,
                "logprobs": None,
                "finish_reason": output["finish_reason"],
                "stop_reason": output["stop_reason"],
            }
        )
    body = {
        "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": usage,
    }
    return _line(line.custom_id, _response(200, body), None)


def error_line(line: BatchLine, status: int, message: str, *, code: str, param: str | None = None) -> bytes:
    """A request that failed, as the API would have answered it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return _line(line.custom_id, _response(status, {"error": error}), None)


def bad_line(number: int, error: BadLine) -> bytes:
    """A line that is no request has no custom_id to answer under; `line` is its number in the input."""
    return _line(None, None, {"code": "invalid_line", "message": f"line {number}: {error}", "line": number})


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": "req_" + secrets.token_hex(12), "body": body}


def _line(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    made = {
        "id": "batch_req_" + secrets.token_hex(12),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    # ASCII, because some readers of lines also break them at U+2028 and its like.
    return json.dumps(made, ensure_ascii=True).encode() + b"\n"
