"""What hostile clients send, and the answer to each: requests in `TABLE`, lines of a file in `LINES`.

Owns the rows; `tests/api/test_hostile.py` sends them. A server with `MAX_BODY_BYTES` and `MAX_ARRAY_JOBS` is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.support.batch_lines import jsonl

MAX_BODY_BYTES = 100_000
MAX_ARRAY_JOBS = 1_000
JSON = ("Content-Type", "application/json")
GOOD = {"model": "asleep", "prompt": "Good night."}


@dataclass(frozen=True)
class Row:
    """One request and its answer. `body`: bytes as they are, anything else as JSON."""

    name: str
    status: int
    code: str
    param: str | None = None
    body: Any = None
    method: str = "POST"
    path: str = "/v1/jobs"
    headers: tuple[tuple[str, str], ...] = (JSON,)


def bad(name: str, param: str | None, code: str = "invalid_value", **fields: Any) -> Row:
    """A job that has something wrong with it."""
    return Row(name, 400, code, param, {**GOOD, **fields})


def raw(name: str, body: bytes, code: str = "invalid_json", status: int = 400) -> Row:
    return Row(name, status, code, None, body)


def get(name: str, path: str, status: int, code: str, param: str | None = None, **more: Any) -> Row:
    return Row(name, status, code, param, path=path, method="GET", headers=(), **more)


def with_headers(
    name: str, status: int, code: str, param: str | None, *headers: tuple[str, str], body: Any = GOOD
) -> Row:
    return Row(name, status, code, param, body, headers=headers)


def told(name: str, variable: str, value: Any) -> Row:
    """A chat that tells its template something that no client may."""
    body = {"messages": USER, "chat_template_kwargs": {variable: value}}
    return Row(name, 400, "invalid_value", f"chat_template_kwargs.{variable}", body)


DEEP = b'{"prompt":' + b"[" * 40_000 + b"]" * 40_000 + b"}"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "a"}]

TABLE = [
    # --- bodies that are no JSON, or not only JSON ---
    raw("nothing", b""),
    raw("blanks", b" \n\t "),
    raw("not JSON", b"prompt=hello"),
    raw("single quotes", b"{'prompt': 'a'}"),
    raw("cut off", b'{"prompt": "a'),
    raw("more behind it", b'{"prompt": "a"} {"prompt": "b"}'),
    raw("a comma too much", b'{"prompt": "a",}'),
    raw("a comment", b'{"prompt": "a" /* b */}'),
    raw("a name twice", b'{"prompt": "a", "prompt": "b"}'),
    raw("NaN", b'{"prompt": "a", "temperature": NaN}'),
    raw("Infinity", b'{"prompt": "a", "temperature": -Infinity}'),
    raw("a byte order mark", b'\xef\xbb\xbf{"prompt": "a"}'),
    raw("UTF-16", '{"prompt": "a"}'.encode("utf-16")),
    raw("no UTF-8", b'{"prompt": "\xff\xfe"}'),
    raw("overlong UTF-8", b'{"prompt": "\xc0\xaf"}'),
    raw("a surrogate in UTF-8", b'{"prompt": "\xed\xa0\x80"}'),
    raw("a bare line break", b'{"prompt": "a\nb"}'),
    raw("deep", DEEP),
    raw("deep objects", b'{"a":' * 9_000 + b"1" + b"}" * 9_000),
    raw("a number of 50,000 digits", b'{"prompt": "a", "seed": ' + b"9" * 50_000 + b"}"),
    raw("large", b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}', "body_too_large", 413),
    raw("a string", b'"prompt"', "invalid_type"),
    raw("an array", b'[{"prompt": "a"}]', "invalid_type"),
    raw("null", b"null", "invalid_type"),
    # --- fields ---
    Row("no prompt", 400, "invalid_value", "prompt", {"model": "asleep"}),
    bad("prompt and messages", "prompt", messages=USER),
    bad("an empty prompt", "prompt", prompt=""),
    bad("a prompt of tokens", "prompt", "invalid_type", prompt=[1, 2, 3]),
    bad("a lone surrogate", "prompt", prompt="\ud800"),
    bad("an unknown field", "promt", "unknown_parameter", promt="a"),
    bad("a field of Python", "__class__", "unknown_parameter", __class__="a"),
    bad("a template", "chat_template", "unknown_parameter", chat_template="{{ 7 * 7 }}"),
    bad("words for a prompt", "chat_template_kwargs", chat_template_kwargs={"enable_thinking": False}),
    told("a template's messages", "messages", "{% for a in range(10**9) %}{% endfor %}"),
    told("a template's functions", "raise_exception", True),
    told("a special token", "eos_token", "a"),
    told("a variable of Python", "__class__", "a"),
    told("a template in a variable", "effort", "{{ 7 * 7 }}"),
    told("a control token in a variable", "effort", "<|im_end|>"),
    told("half a character in a variable", "effort", "\ud800"),
    told("a list in a variable", "effort", [[]]),
    told("a variable of 65 bits", "effort", 2**64),
    Row(
        "a variable that is no name",
        400,
        "invalid_value",
        "chat_template_kwargs",
        {"messages": USER, "chat_template_kwargs": {"\ud800 {{ 7 * 7 }}": 1}},
    ),
    Row(
        "many variables",
        400,
        "invalid_value",
        "chat_template_kwargs",
        {"messages": USER, "chat_template_kwargs": {f"a{i}": 1 for i in range(5_000)}},
    ),
    Row(
        "two efforts",
        400,
        "invalid_value",
        "reasoning_effort",
        {"messages": USER, "reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
        path=CHAT,
    ),
    bad("tools", "tools", "unknown_parameter", tools=[{"type": "function"}]),
    Row("no messages", 400, "invalid_value", "messages", {"messages": []}),
    Row("a role", 400, "invalid_value", "messages[0].role", {"messages": [{"role": "root", "content": "a"}]}),
    Row(
        "an image",
        400,
        "invalid_value",
        "messages[0].content",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}
            ]
        },
    ),
    bad("an empty custom_id", "custom_id", custom_id=""),
    bad("a NUL", "custom_id", custom_id="a\x00b"),
    bad("a long custom_id", "custom_id", custom_id="a" * 513),
    bad("a long model", "model", model="a" * 256),
    bad("metadata in metadata", "metadata.a", "invalid_type", metadata={"a": {"b": "c"}}),
    bad("much metadata", "metadata", metadata={str(i): "a" for i in range(17)}),
    bad("a stop of nothing", "stop", stop=""),
    bad("many stops", "stop", stop=[f"stop {i}" for i in range(1_000)]),
    bad("a grammar of two kinds", "structured_outputs", structured_outputs={"regex": "a", "choice": ["b"]}),
    bad("no such format", "response_format.type", response_format={"type": "xml"}),
    # --- numbers ---
    bad("no tokens", "max_tokens", max_tokens=0),
    bad("fewer than no tokens", "max_tokens", max_tokens=-(2**70)),
    bad("half a token", "max_tokens", "invalid_type", max_tokens=1.5),
    bad("true tokens", "max_tokens", "invalid_type", max_tokens=True),
    bad("tokens in a string", "max_tokens", "invalid_type", max_tokens="16"),
    bad("many samples", "n", n=2**40),
    bad("a negative temperature", "temperature", temperature=-0.1),
    bad("a hot temperature", "temperature", temperature=1e308),
    Row(
        "a temperature beyond floats",
        400,
        "invalid_value",
        "temperature",
        b'{"prompt": "a", "temperature": 1e999}',
    ),
    bad("top_p below nothing", "top_p", top_p=-0.1),
    bad("a seed of 200 bits", "seed", seed=2**200),
    bad("bias of a word", "logit_bias", logit_bias={"word": 1}),
    bad("bias of token -1", "logit_bias", logit_bias={"-1": 1}),
    bad("many logprobs", "logprobs", logprobs=True, top_logprobs=20, max_tokens=100_000),
    bad("a priority", "priority", priority=10**9),
    bad("a deadline that has passed", "deadline", deadline=1),
    bad("a deadline in a million years", "deadline", deadline=3e13),
    bad("a window", "completion_window", completion_window="24 hours"),
    bad("many attempts", "retry.max_attempts", retry={"max_attempts": 10**6}),
    # --- many jobs ---
    Row("no jobs", 400, "invalid_value", "jobs", {"jobs": []}),
    Row("jobs in an object", 400, "invalid_type", "jobs", {"jobs": {"0": GOOD}}),
    Row("too many jobs", 400, "invalid_value", "jobs", {"jobs": [{}] * (MAX_ARRAY_JOBS + 1)}),
    Row("the last job", 400, "invalid_value", "jobs[9].n", {"jobs": [GOOD] * 9 + [{**GOOD, "n": -1}]}),
    Row(
        "a deadline inside",
        400,
        "misplaced_parameter",
        "jobs[0].deadline",
        {"jobs": [{**GOOD, "deadline": 4e9}]},
    ),
    # --- OpenAI's routes ---
    Row("a chat without messages", 400, "missing_required_parameter", "messages", {"model": "a"}, path=CHAT),
    Row(
        "a model that nobody serves",
        404,
        "model_not_found",
        "model",
        {"model": "../../etc/passwd", "messages": USER},
        path=CHAT,
    ),
    Row("two prompts", 400, "unsupported_value", "prompt", {"prompt": ["a", "b"]}, path=TEXT),
    Row("tokens as a prompt", 400, "unsupported_value", "prompt", {"prompt": [1]}, path=TEXT),
    Row("a stream of yes", 400, "invalid_type", "stream", {"messages": USER, "stream": "yes"}, path=CHAT),
    Row("a batch of no file", 400, "missing_required_parameter", "input_file_id", {}, path="/v1/batches"),
    Row(
        "a batch of a file elsewhere",
        404,
        "not_found",
        "input_file_id",
        {"input_file_id": "../../etc/passwd", "endpoint": CHAT, "completion_window": "24h"},
        path="/v1/batches",
    ),
    Row(
        "a cron line",
        400,
        "invalid_value",
        "cron",
        {"name": "a", "cron": "61 * * * *", "jobs": [GOOD]},
        path="/v1/schedules",
    ),
    Row(
        "a time zone",
        400,
        "invalid_value",
        "time_zone",
        {"name": "a", "cron": "1 * * * *", "time_zone": "../../etc/passwd", "jobs": [GOOD]},
        path="/v1/schedules",
    ),
    # --- headers ---
    with_headers("a form", 415, "unsupported_media_type", "content-type", ("Content-Type", "text/plain")),
    with_headers("no type", 415, "unsupported_media_type", "content-type"),
    with_headers(
        "compressed", 415, "unsupported_encoding", "content-encoding", JSON, ("Content-Encoding", "gzip")
    ),
    with_headers("an empty key", 400, "invalid_header", "idempotency-key", JSON, ("Idempotency-Key", "")),
    with_headers(
        "a long key", 400, "invalid_header", "idempotency-key", JSON, ("Idempotency-Key", "a" * 256)
    ),
    with_headers(
        "two keys",
        400,
        "invalid_header",
        "idempotency-key",
        JSON,
        ("Idempotency-Key", "a"),
        ("Idempotency-Key", "b"),
    ),
    with_headers(
        "a terabyte", 413, "body_too_large", None, JSON, ("Content-Length", "1000000000000"), body=b""
    ),
    with_headers("a host elsewhere", 421, "misdirected_request", "host", JSON, ("Host", "evil.example")),
    Row(
        "a file that is no form",
        415,
        "unsupported_media_type",
        "content-type",
        b"{}",
        path="/v1/files",
    ),
    Row(
        "a form without an end",
        400,
        "invalid_multipart",
        None,
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch',
        path="/v1/files",
        headers=(("Content-Type", "multipart/form-data; boundary=x"),),
    ),
    *(
        Row(
            name,
            403,
            "cross_origin",
            "origin",
            b"",
            path="/v1/files",
            headers=(("Content-Type", "multipart/form-data; boundary=x"), ("Origin", origin)),
        )
        for name, origin in (
            ("a form from a web page", "http://evil.example"),
            ("half an origin", "http://["),
        )
    ),
    *(
        Row(
            f"{name} as a file",
            404,
            "not_found",
            "input_file_id",
            {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"},
            path="/v1/batches",
        )
        for name, file_id in (
            ("half a character", "\ud800"),
            ("NUL", "file-\x00"),
            ("4,000 letters", "f" * 4_000),
        )
    ),
    # --- query strings ---
    get("a limit of none", "/v1/jobs?limit=0", 400, "invalid_value", "limit"),
    get("a limit without end", "/v1/jobs?limit=1e9", 400, "invalid_value", "limit"),
    get("two limits", "/v1/jobs?limit=1&limit=2", 400, "invalid_value", "limit"),
    get("an unknown parameter", "/v1/jobs?limt=1", 400, "unknown_parameter", "limt"),
    get("not a number", "/v1/jobs?created_after=nan", 400, "invalid_value", "created_after"),
    get("a status", "/v1/jobs?status=done", 400, "invalid_value", "status"),
    get("a NUL in a query", "/v1/jobs?custom_id=%00", 400, "invalid_value", "custom_id"),
    get("SQL", "/v1/batches?order=id;DROP%20TABLE%20jobs", 400, "unknown_parameter", "order"),
    get("usage of a month", "/v1/usage?start=2026-13-01", 400, "invalid_value", "start"),
    # --- paths ---
    get("no such route", "/v1/job", 404, "not_found"),
    get("a slash too much", "/v1/jobs/", 404, "not_found"),
    get("two slashes", "//v1/jobs", 404, "not_found"),
    get("up and away", "/v1/files/../../../etc/passwd", 404, "not_found"),
    get("up, disguised", "/v1/files/..%2f..%2fetc%2fpasswd/content", 404, "not_found"),
    get("up, as an id", "/v1/files/%2e%2e/content", 404, "not_found", "file_id"),
    get("NUL as an id", "/v1/jobs/%00", 404, "not_found", "job_id"),
    get("SQL as an id", "/v1/jobs/'%20OR%201=1--", 404, "not_found", "job_id"),
    get("a new line as an id", "/v1/batches/a%0d%0aX-Evil:%201", 404, "not_found", "batch_id"),
    get("no UTF-8 as an id", "/v1/jobs/%ff%fe", 404, "not_found", "job_id"),
    get("a long id", "/v1/jobs/" + "a" * 5_000, 404, "not_found", "job_id"),
    Row("a method", 405, "method_not_allowed", method="PUT"),
    Row("a method of nobody", 400, "invalid_http_request", method="BREW"),
]

# Lines of a file: what a batch's `errors` says of each, by line.
LINE = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "asleep", "messages": USER}}
LINES: list[tuple[bytes, str]] = [
    (b"{", "invalid_json_line"),
    (b"[]", "invalid_json_line"),
    (b'{"custom_id": "\xff"}', "invalid_json_line"),
    (DEEP, "invalid_json_line"),
    (jsonl([{**LINE, "custom_id": None}]).strip(), "invalid_request"),
    (jsonl([{**LINE, "method": "GET"}]).strip(), "invalid_request"),
    (jsonl([{**LINE, "url": TEXT}]).strip(), "url_mismatch"),
    (jsonl([{**LINE, "body": None}]).strip(), "invalid_request"),
    (jsonl([{**LINE, "body": {"messages": USER, "n": -1}}]).strip(), "invalid_request"),
]
