"""BatchCheck: what is wrong with a line is told by its number and a code, and a long file takes no memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from jobs.batch_check import Findings, check_file
from jobs.line_check import BLOCK_BYTES, MAX_ERRORS, max_line_bytes
from jobs.settings import Settings
from tests.support.batch_lines import CHAT, COMPLETIONS, chat_line, jsonl

SETTINGS = Settings(model="tiny", max_body_bytes=20_000, max_batch_jobs=300)
MODELS = frozenset({"tiny", "other"})


def check(content: bytes, endpoint: str = CHAT, settings: Settings = SETTINGS, **change: Any) -> Findings:
    options: dict[str, Any] = {"known_models": MODELS, "tick": lambda: None} | change
    return check_file(io.BytesIO(content), endpoint, settings, **options)


def raw(number: int = 0, **change: Any) -> bytes:
    """A good line with other fields; a body's own go into `body`."""
    line = chat_line(number)
    line["body"] |= change.pop("body", {})
    return json.dumps({name: value for name, value in (line | change).items() if value != "absent"}).encode()


HOSTILE = {
    "no JSON": (b"nonsense", "invalid_json_line", None),
    "cut short": (raw()[:-1], "invalid_json_line", None),
    "two values": (raw() + raw(), "invalid_json_line", None),
    "an array": (b"[]", "invalid_json_line", None),
    "a number": (b"1", "invalid_json_line", None),
    "null": (b"null", "invalid_json_line", None),
    "not UTF-8": (raw().replace(b"Write", b"\xff"), "invalid_json_line", None),
    "UTF-16": (raw().decode().encode("utf-16"), "invalid_json_line", None),
    "a byte order mark within": (b"\xef\xbb\xbf" + raw(), "invalid_json_line", None),
    "NaN": (raw().replace(b'"seed": 0', b'"temperature": NaN'), "invalid_json_line", None),
    "a name twice": (raw().replace(b'"seed": 0', b'"seed": 0, "seed": 1'), "invalid_json_line", None),
    "a long number": (raw().replace(b'"seed": 0', b'"seed": ' + b"9" * 5_000), "invalid_json_line", None),
    "deep": (raw().replace(b'"seed": 0', b'"x": ' + b"[" * 300 + b"]" * 300), "invalid_json_line", None),
    "deeper than Python goes": (b"[" * 5_000 + b"]" * 5_000, "invalid_json_line", None),
    "long": (raw(body={"user": "x" * max_line_bytes(SETTINGS)}), "invalid_request", None),
    "a long prompt": (
        raw(body={"messages": [{"role": "user", "content": "x" * 20_001}]}),
        "invalid_request",
        "body.messages",
    ),
    "no custom_id": (raw(custom_id="absent"), "invalid_request", "custom_id"),
    "an empty custom_id": (raw(custom_id=""), "invalid_request", "custom_id"),
    "a number as custom_id": (raw(custom_id=7), "invalid_request", "custom_id"),
    "half a character": (raw(custom_id="\ud800"), "invalid_request", "custom_id"),
    "NUL in the custom_id": (raw(custom_id="a\0"), "invalid_request", "custom_id"),
    "a long custom_id": (raw(custom_id="x" * 513), "invalid_request", "custom_id"),
    "another line's custom_id": (raw(custom_id="line-1000"), "duplicate_custom_id", "custom_id"),
    "GET": (raw(method="GET"), "invalid_request", "method"),
    "another endpoint": (raw(url=COMPLETIONS), "url_mismatch", "url"),
    "no url": (raw(url="absent"), "url_mismatch", "url"),
    "a list as url": (raw(url=[CHAT]), "url_mismatch", "url"),
    "no body": (b'{"custom_id": "x", "url": "%s"}' % CHAT.encode(), "invalid_request", "body"),
    "a field too many": (raw(extra=1), "invalid_request", "extra"),
    "no model": (raw(body={"model": None}), "invalid_request", "body.model"),
    "an unknown model": (raw(body={"model": "gpt-4o"}), "model_not_found", "body.model"),
    "a stream": (raw(body={"stream": True}), "invalid_request", "body.stream"),
    "tools": (raw(body={"tools": [{"type": "function"}]}), "invalid_request", "body.tools"),
    "an image": (
        raw(body={"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        "invalid_request",
        "body.messages[0].content",
    ),
    "no messages": (raw(body={"messages": []}), "invalid_request", "body.messages"),
    "a prompt in a chat": (raw(body={"prompt": "p"}), "invalid_request", "body.prompt"),
    "too hot": (raw(body={"temperature": 3}), "invalid_request", "body.temperature"),
    "too many samples": (raw(body={"n": 1_000}), "invalid_request", "body.n"),
    "an unknown field": (raw(body={"temprature": 1}), "invalid_request", "body.temprature"),
    "a second custom_id": (raw(body={"custom_id": "b"}), "invalid_request", "body.custom_id"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_line_is_told_by_number_and_code(name: str) -> None:
    line, code, param = HOSTILE[name]
    content = jsonl([chat_line(1000)]) + b"\n" + line + b"\n" + jsonl([chat_line(1001)])
    (error,) = check(content).errors
    assert (error["line"], error["code"], error["param"]) == (3, code, param)
    assert error["message"]
    assert len(error["message"]) < 1_200
    assert error["message"].encode()


def test_all_bad_lines_of_a_file_are_told_in_their_order() -> None:
    lines = [
        line.replace(b'"line-0"', b'"line-%d"' % number)
        for number, (line, _, _) in enumerate(HOSTILE.values())
    ]
    content = jsonl([chat_line(1000)]) + b"\n".join(lines)
    errors = check(content).errors
    assert [error["line"] for error in errors] == list(range(2, len(lines) + 2))
    told = [(code, param) for _, code, param in HOSTILE.values()]
    assert [(error["code"], error["param"]) for error in errors] == told


def test_a_good_file_is_measured() -> None:
    findings = check(
        b"\xef\xbb\xbf" + jsonl([chat_line(i) for i in range(3)]) + b"\r\n  \n" + raw(3) + b"\r\n"
    )
    assert findings.errors == []
    assert (findings.load.jobs, findings.model) == (4, "tiny")
    assert findings.load.tokens == 4 * (8 + 4)
    assert findings.load.stored_bytes > 4 * 80
    two = check(jsonl([chat_line(0), chat_line(1, model="other")]))
    assert (two.errors, two.model) == ([], None)


def test_no_line_and_too_many() -> None:
    for empty in (b"", b"\n \n"):
        assert [error["code"] for error in check(empty).errors] == ["empty_file"]
    fits = jsonl([chat_line(i) for i in range(300)])
    assert check(fits).errors == []
    (error,) = check(fits + raw(300)).errors
    assert (error["code"], error["line"]) == ("too_many_tasks", 301)


def test_a_check_stops_at_a_hundred_errors() -> None:
    ticks: list[int] = []
    errors = check(b"{}\n" * BLOCK_BYTES, tick=lambda: ticks.append(1)).errors
    assert [error["line"] for error in errors] == list(range(1, MAX_ERRORS + 1))
    assert len(ticks) == 1
    errors = check(jsonl([chat_line(7)] * 250)).errors
    assert {error["code"] for error in errors} == {"duplicate_custom_id"}
    assert [error["line"] for error in errors] == list(range(2, MAX_ERRORS + 2))
    assert "line 1" in errors[-1]["message"]


def test_a_model_nobody_has_heard_of_may_still_come() -> None:
    assert check(raw(), known_models=frozenset()).errors == []


def test_blank_lines_keep_the_lease_alive_too() -> None:
    ticks: list[int] = []
    check(b"\n" * 3 * BLOCK_BYTES + raw(), tick=lambda: ticks.append(1))
    assert len(ticks) == 4


@pytest.mark.long
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """The bound is per line: what the long test measures with a million of them."""
    settings = SETTINGS.model_copy(update={"max_batch_jobs": 10**6})
    count = 20_000
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for i in range(count):
            file.write(raw(i) + b"\n")
    with path.open("rb") as file:
        tracemalloc.start()
        findings = check_file(file, CHAT, settings, known_models=MODELS, tick=lambda: None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert findings.load.jobs == count
    assert peak < count * 40, f"{peak / count:.0f} bytes per line"
