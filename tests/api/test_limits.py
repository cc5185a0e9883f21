"""Bodies are bounded while they arrive, and read strictly."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.body import JobBody
from jobs.settings import Settings
from tests.api.conftest import LIMITS
from tests.api.test_job_routes import error_of

JSON = {"content-type": "application/json"}


@pytest.fixture(name="limits")
def _limits() -> Settings:
    return Settings(model="tiny", **LIMITS)


def post(front: TestClient, content: Any, **headers: str) -> Any:
    return front.post("/v1/jobs", content=content, headers=JSON | headers)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"   ",
        b"{",
        b'{"prompt": "a",}',
        b"{'prompt': 'a'}",
        b'{"prompt": "a"} {}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "metadata": {"k": "1", "k": "2"}}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "seed": ' + b"9" * 5_000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"prompt": "a"}',
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "a\nb"}',
        b'{"prompt": ' + b"[" * 4_000 + b"]" * 4_000 + b"}",
        b'{"a":' * 1_500 + b"1" + b"}" * 1_500,
    ],
)
def test_what_is_not_strict_json_is_refused(front: TestClient, raw: bytes) -> None:
    assert error_of(post(front, raw), 400)["code"] == "invalid_json"


def test_a_single_job_has_its_own_limit(front: TestClient, limits: Settings) -> None:
    body = json.dumps({"prompt": "x" * 5_000}).encode()
    fits = body + b" " * (limits.max_body_bytes - len(body))
    assert post(front, fits).status_code == 202
    assert error_of(post(front, fits + b" "), 413)["code"] == "body_too_large"


def test_an_array_has_another(front: TestClient, limits: Settings) -> None:
    body = json.dumps({"jobs": [{"prompt": "x" * 3_000}] * 50}).encode()
    fits = body + b" " * (limits.max_array_bytes - len(body))
    assert post(front, fits).status_code == 202
    assert error_of(post(front, fits + b" "), 413)["code"] == "body_too_large"


def test_the_word_jobs_does_not_make_an_array(front: TestClient) -> None:
    body = {"prompt": "x" * 20_000, "custom_id": "c"}
    assert error_of(post(front, json.dumps({"metadata": {"jobs": "1"}, **body}).encode()), 413)
    nested = {"prompt": "a", "metadata": {"jobs": "x" * 20_000}}
    assert error_of(post(front, json.dumps(nested).encode()), 413)


@pytest.mark.parametrize(("start", "limit"), [(b'{"prompt": "', 10_000), (b'{"jobs": ["', 200_000)])
def test_an_endless_body_is_cut_while_it_arrives(front: TestClient, start: bytes, limit: int) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield start
        while sent < 100 * limit:
            sent += 1_000
            yield b"x" * 1_000

    error = error_of(post(front, endless()), 413)
    assert str(limit) in error["message"]


def test_an_announced_length_is_believed_when_it_is_too_large(front: TestClient) -> None:
    assert error_of(post(front, b"{}", **{"content-length": "99999999999"}), 413)


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, deflate", "x"])
def test_compressed_bodies_are_refused(front: TestClient, encoding: str) -> None:
    error = error_of(post(front, b'{"prompt": "a"}', **{"content-encoding": encoding}), 415)
    assert (error["param"], error["code"]) == ("content-encoding", "unsupported_encoding")


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json_is_read(front: TestClient, media: str) -> None:
    answer = front.post("/v1/jobs", content=b'{"prompt": "a"}', headers={"content-type": media})
    assert error_of(answer, 415)["param"] == "content-type"
    assert error_of(front.post("/v1/jobs", content=b'{"prompt": "a"}', headers={"content-type": ""}), 415)
    typed = {"content-type": "Application/JSON; charset=utf-8"}
    assert front.post("/v1/jobs", content=b'{"prompt": "a"}', headers=typed).status_code == 202


def test_a_long_text_in_an_array_has_the_limit_of_a_job(front: TestClient) -> None:
    body = {"jobs": [{"prompt": "a"}, {"prompt": "x" * 10_001}]}
    assert error_of(post(front, json.dumps(body).encode()), 400)["param"] == "jobs[1].prompt"


def test_the_errors_of_a_hostile_body_are_cheap(front: TestClient) -> None:
    body = {"jobs": [{"prompt": "a", **{f"f{i}": 1 for i in range(300)}}] * 40}
    started = time.process_time()  # of all threads
    assert error_of(post(front, json.dumps(body).encode()), 400)["param"].startswith("jobs[0].f")
    assert time.process_time() - started < 5.0


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=()), max_size=20),  # lone surrogates and NUL too
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
_MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.just("user") | _VALUES, "content": _VALUES}), max_size=3
)
_JOBS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(JobBody.model_fields, _VALUES),
        "prompt": st.just("a") | _VALUES,
        "messages": _MESSAGES | _VALUES,
        "surprise": _VALUES,
    },
)
_TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
_GOOD_JOBS = st.fixed_dictionaries(  # most of them: NUL in a name is refused
    {"prompt": _TEXT},
    optional={
        "model": _TEXT,
        "custom_id": _TEXT,
        "metadata": st.dictionaries(_TEXT, _TEXT, max_size=3),
        "stop": _TEXT | st.lists(_TEXT, max_size=3),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "temperature": st.floats(0, 2) | st.integers(0, 2),
        "max_tokens": st.integers(1, 2**31),
        "stop_token_ids": st.lists(st.integers(0, 2**31), max_size=3),
    },
)
_BODIES = (
    _GOOD_JOBS
    | _JOBS
    | _VALUES
    | st.fixed_dictionaries(
        {"jobs": st.lists(_GOOD_JOBS, min_size=1, max_size=3) | st.lists(_JOBS, max_size=3) | _VALUES}
    )
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=_BODIES)
def test_no_json_value_breaks_the_api(front: TestClient, body: Any) -> None:
    answer = post(front, json.dumps(body).encode())
    if answer.status_code == 202:
        kind = "batches" if "jobs" in body else "jobs"
        assert front.get(f"/v1/{kind}/{answer.json()['id']}").json() == answer.json()
    else:
        error_of(answer, 400)
