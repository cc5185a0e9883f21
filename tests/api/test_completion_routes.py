"""Requests that wait for their answers, over HTTP. The worker here is a function; a real one is in tests/story."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from openai.types.responses import Response, ResponseReasoningItem

from api import completion_routes
from api.app import create_app
from api.waits import Wait
from jobs import listeners
from jobs.audience import Piece
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.database import Database
from jobs.leases import leave, register
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.states import JobState
from tests.api.conftest import LIMITS
from tests.api.test_job_routes import LOGPROBS, error_of
from tests.support import rows
from tests.support.clients import bearer, key_of, local_client
from tests.support.databases import Databases
from tests.support.waiting import wait_until

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "hi"}
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/v1/responses": {"model": "tiny", "input": "hi"},
}
OUTPUT = {"index": 0, "text": "so\u2028", "finish_reason": "stop", "stop_reason": None}
SECONDS = 20.0  # of patience of the service in these tests


@pytest.fixture(scope="module")
def database(databases: Databases) -> Iterator[Database]:
    with databases.fresh("sqlite") as url:
        database = Database(url)
        key_of(database, "default")
        yield database
        database.close()


def app_of(database: Database, folder: Path, woken: list[str] | None = None, **settings: Any) -> Any:
    """Without any Redis: what it would say sooner is found in SQL."""
    made = Settings(data_dir=folder, model="tiny", **{"interactive_seconds": SECONDS} | LIMITS | settings)
    return create_app(made, database, ([] if woken is None else woken).append)


@pytest.fixture
def client(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(listeners, "LOOK_SECONDS", 0.02)
    headers = bearer(key_of(database, "default"))
    with local_client(app_of(database, tmp_path), raise_server_exceptions=False, headers=headers) as client:
        yield client


@contextmanager
def worker(
    database: Database, *, begin: threading.Event | None = None, **change: Any
) -> Iterator[list[dict[str, Any]]]:
    """From `begin` on ends every job as `change` says; the bodies it was given."""
    bodies: list[dict[str, Any]] = []
    stopping = threading.Event()

    def work() -> None:
        if begin is not None:
            begin.wait(SECONDS)
        while not stopping.wait(0.01):
            for item in database.transact(partial(claim, worker_id="w", model="tiny", limit=9)):
                bodies.append(item.body)
                given = {"kind": "completed", "outputs": [OUTPUT], "prompt_tokens": 3, "completion_tokens": 2}
                outcome = Outcome(job_id=item.job_id, fence=item.fence, **given | change)
                database.transact(partial(record, worker_id="w", outcomes=[outcome]))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield bodies
    finally:
        stopping.set()
        thread.join()


def events_of(answer: Any) -> list[Any]:
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-request-id"]
    lines = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    return [line.removeprefix("data: ") for line in lines]


def test_answers_have_openais_shape(client: TestClient, database: Database) -> None:
    with worker(database) as bodies:
        chat = ChatCompletion.model_validate(client.post("/v1/chat/completions", json=CHAT).json())
        text = Completion.model_validate(client.post("/v1/completions", json=TEXT).json())
        response = Response.model_validate(client.post("/v1/responses", json=ROUTES["/v1/responses"]).json())
    assert chat.choices[0].message.content == text.choices[0].text == response.output_text == "so\u2028"
    assert chat.usage is not None
    assert chat.usage.total_tokens == 5
    job = rows.job(database, "job_" + chat.id.removeprefix("chatcmpl-"))
    assert (job.tier, job.audience, job.model) == (0, 1, "tiny")
    assert [body.get("max_tokens") for body in bodies] == [None, 16, None]
    assert response.status == "completed"
    assert response.usage is not None
    assert response.usage.output_tokens == 2
    assert client.get(f"/v1/responses/{response.id}").json()["output"][0]["content"][0]["text"] == "so\u2028"


def test_thoughts_stand_beside_the_answer(client: TestClient, database: Database) -> None:
    thinking = OUTPUT | {"reasoning": "hm", "reasoning_tokens": 1}
    with worker(database, outputs=[thinking]):
        answers = {url: client.post(url, json=body).json() for url, body in ROUTES.items()}
        events = events_of(client.post("/v1/chat/completions", json=CHAT | {"stream": True}))
    chat = ChatCompletion.model_validate(answers["/v1/chat/completions"])
    message = chat.choices[0].message.to_dict()
    assert (message["content"], message["reasoning_content"]) == ("so\u2028", "hm")
    assert chat.usage is not None
    assert chat.usage.completion_tokens_details is not None
    assert chat.usage.completion_tokens_details.reasoning_tokens == 1
    response = Response.model_validate(answers["/v1/responses"])
    assert [item.type for item in response.output] == ["reasoning", "message"]
    thought = response.output[0]
    assert isinstance(thought, ResponseReasoningItem)
    assert [part.text for part in thought.content or ()] == ["hm"]
    assert response.output_text == "so\u2028"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 1
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[1:] == [{"reasoning_content": "hm"}, {"content": "so\u2028"}, {}]


def test_an_effort_and_a_switch_reach_the_worker(client: TestClient, database: Database) -> None:
    hushed = {"chat_template_kwargs": {"enable_thinking": False}}
    asked = {"input": "hi", "model": "tiny", "reasoning": {"effort": "low"}}
    with worker(database) as bodies:
        for url, body in (
            ("/v1/chat/completions", CHAT | hushed | {"reasoning_effort": "high"}),
            ("/v1/chat/completions", CHAT | hushed | {"reasoning_effort": "none"}),
            ("/v1/responses", asked),
        ):
            assert client.post(url, json=body).status_code == 200
    assert [body["chat_template_kwargs"] for body in bodies] == [
        {"enable_thinking": False, "reasoning_effort": "high"},
        {"enable_thinking": False},
        {"reasoning_effort": "low"},
    ]
    error = error_of(client.post("/v1/chat/completions", json=CHAT | {"reasoning_effort": "most"}), 400)
    assert (error["param"], error["code"]) == ("reasoning_effort", "invalid_value")


def test_logprobs_of_text_completions(client: TestClient, database: Database) -> None:
    with worker(database, outputs=[OUTPUT | {"logprobs": LOGPROBS}]):
        numbered = Completion.model_validate(
            client.post("/v1/completions", json=TEXT | {"logprobs": 1}).json()
        )
        by_name = client.post("/v1/completions", json=TEXT | {"logprobs": True, "top_logprobs": 1}).json()
    logprobs = numbered.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["<eos>"], [0])
    assert logprobs.top_logprobs == [{"\x00": -0.5, "<eos>": -9999.0}]
    assert by_name["choices"][0]["logprobs"] == logprobs.model_dump()


def test_a_stream_without_redis_is_whole(client: TestClient, database: Database) -> None:
    with worker(database):
        answer = client.post(
            "/v1/chat/completions", json=CHAT | {"stream": True, "stream_options": {"include_usage": True}}
        )
    *events, last = events_of(answer)
    assert last == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "so\u2028"
    assert chunks[-1]["usage"]["completion_tokens"] == 2


def test_a_failure_before_and_after_a_stream_begins(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"code": "context_length_exceeded", "message": "too long", "param": "messages"}
    with worker(database, kind="failed", error=error):
        for stream in (False, True):
            answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert error_of(answer, 400)["code"] == "context_length_exceeded"
            assert error_of(answer, 400)["param"] == "messages"
            assert answer.headers["x-should-retry"] == "false"
        answer = client.post("/v1/responses", json={"model": "tiny", "input": "x"})
        assert error_of(answer, 400)["param"] == "input"
        response = client.post(
            "/v1/responses", json={"model": "tiny", "input": "x", "background": True}
        ).json()
        path = f"/v1/responses/{response['id']}"
        wait_until(lambda: client.get(path).json()["status"] == "failed", "it fails")
        assert "too long" in Response.model_validate(client.get(path).json()).error.message  # type: ignore[union-attr]
    monkeypatch.setattr(completion_routes, "BEGIN_SECONDS", 0.0)
    with worker(database, kind="failed", error=error | {"code": "engine_crash"}):
        *_, last = events_of(client.post("/v1/chat/completions", json=CHAT | {"stream": True}))
        assert json.loads(last)["error"]["type"] == "server_error"
        answer = client.post("/v1/completions", json=TEXT)
        assert error_of(answer, 500)["code"] == "engine_crash"
        assert answer.headers["x-should-retry"] == "false"


def test_a_silent_stream_is_kept_alive(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion_routes, "BEGIN_SECONDS", 0.01)
    monkeypatch.setattr(completion_routes, "KEEP_ALIVE_SECONDS", 0.01)
    silences, long_silent = count(), threading.Event()

    async def counted(wait: Wait, timeout: float, news: Any = Wait.news) -> list[Piece]:
        if next(silences) == 4:
            long_silent.set()
        pieces: list[Piece] = await news(wait, timeout)
        return pieces

    monkeypatch.setattr(Wait, "news", counted)
    with worker(database, begin=long_silent):
        answer = client.post("/v1/completions", json=TEXT | {"stream": True})
    assert answer.text.count(": keep-alive\n\n") > 1
    assert events_of(answer)[-1] == "[DONE]"


@pytest.mark.parametrize("url", ROUTES)
def test_nobody_answers_in_time(
    database: Database, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion_routes, "BEGIN_SECONDS", 0.0)
    before = set(rows.jobs_by_state(database).get("cancelled", []))
    headers = bearer(key_of(database, "default"))
    if url != "/v1/responses":
        app = app_of(database, tmp_path, interactive_seconds=0.5)  # enough to begin a stream
        with local_client(app, headers=headers) as client:
            *_, last = events_of(client.post(url, json=ROUTES[url] | {"stream": True}))
            assert json.loads(last)["error"]["code"] == "timeout"
    with local_client(app_of(database, tmp_path, interactive_seconds=0.05), headers=headers) as client:
        answer = client.post(url, json=ROUTES[url])
        error = error_of(answer, 504)
        assert (error["code"], answer.headers["x-should-retry"]) == ("timeout", "false")
        kept = client.post(url, json=ROUTES[url], headers={"Idempotency-Key": f"late {url}"})
        assert "goes on" in error_of(kept, 504)["message"]
    expected = 1 if url == "/v1/responses" else 2
    # The application ends its cancels before it ends itself.
    states = rows.jobs_by_state(database)
    assert len(set(states["cancelled"]) - before) == expected
    (waiting,) = states["queued"]
    with local_client(app_of(database, tmp_path), headers=headers) as client:
        with worker(database):
            again = client.post(url, json=ROUTES[url], headers={"Idempotency-Key": f"late {url}"})
        assert again.status_code == 200
        assert again.json()["id"].partition("_" if "responses" in url else "-")[2] == waiting.removeprefix(
            "job_"
        )


def test_somebody_else_cancels(client: TestClient, database: Database) -> None:
    def cancel() -> None:
        (job_id,) = wait_until(lambda: rows.jobs_by_state(database).get("queued"), "it is there")
        Cancels(database).cancel_job(job_id, tenant="default")

    thread = threading.Thread(target=cancel)
    thread.start()
    answer = client.post("/v1/chat/completions", json=CHAT)
    thread.join()
    assert error_of(answer, 409)["code"] == "cancelled"
    assert answer.headers["x-should-retry"] == "false"


def test_workers_are_woken_once_and_at_once(database: Database, tmp_path: Path) -> None:
    woken: list[str] = []
    app = app_of(database, tmp_path, woken, interactive_seconds=0.05)
    with local_client(app, headers=bearer(key_of(database, "default"))) as client:
        client.post("/v1/chat/completions", json=CHAT)
    assert woken == ["tiny"]


def test_models(client: TestClient, database: Database) -> None:
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]
    with database.write() as connection:
        register(connection, worker_id="other", model="org/other", lease_seconds=60)
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [Model.model_validate(one).id for one in listed["data"]] == ["org/other", "tiny"]
    assert client.get("/v1/models/org/other").json() == listed["data"][0]
    assert client.get("/v1/models/org%2Fother").json() == listed["data"][0]
    with database.write() as connection:
        leave(connection, worker_id="other")
    assert error_of(client.get("/v1/models/org/other"), 404)["code"] == "model_not_found"
    before = rows.jobs_by_state(database)
    for url, body in ROUTES.items():
        error = error_of(client.post(url, json=body | {"model": "org/other"}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert rows.jobs_by_state(database) == before


@pytest.mark.parametrize("url", ROUTES)
def test_what_is_no_request(client: TestClient, url: str) -> None:
    for body in ([], "x", 7):
        assert error_of(client.post(url, json=body), 400)["code"] == "invalid_type"
    assert error_of(client.post(url, json=ROUTES[url] | {"jobs": []}), 400)["param"] == "jobs"
    assert error_of(client.post(url + "?stream=true", json=ROUTES[url]), 400)["param"] == "stream"
    assert error_of(client.post(url, content=b"{}", headers={"content-type": "text/plain"}), 415)
    big = {"model": "tiny", "prompt": "x" * 20_000}
    assert error_of(client.post(url, json=big), 413)["code"] == "body_too_large"
    assert error_of(client.post(url, json=big | {"jobs": []}), 413)["code"] == "body_too_large"
    assert error_of(client.get(url), 405)


def test_a_response_in_the_background_belongs_to_its_tenant(client: TestClient, database: Database) -> None:
    asked = {"model": "tiny", "input": "x", "background": True, "max_output_tokens": 5, "temperature": 0.5}
    asked |= {"instructions": "Be brief.", "reasoning": {"effort": "low"}, "metadata": {"k": "v"}}
    told = client.post("/v1/responses", json=asked).json()
    made = Response.model_validate(told)
    assert (made.status, made.background, made.output, made.max_output_tokens) == ("queued", True, [], 5)
    said = {name: told[name] for name in ("instructions", "temperature", "top_p", "metadata", "store")}
    assert said == {
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 1.0,
        "metadata": {"k": "v"},
        "store": True,
    }
    assert (told["reasoning"], told["text"]["format"]) == (
        {"effort": "low", "summary": None},
        {"type": "text"},
    )
    job = rows.job(database, "job_" + made.id.removeprefix("resp_"))
    assert (job.tier, job.audience) == (2, 0)
    path = f"/v1/responses/{made.id}"
    stranger = bearer(key_of(database, "other"))
    assert error_of(client.get(path, headers=stranger), 404)
    assert error_of(client.post(path + "/cancel", headers=stranger), 404)
    for name in ("resp_x", "job_" + made.id.removeprefix("resp_"), "resp_%00", "resp_" + "x" * 300):
        assert error_of(client.get(f"/v1/responses/{name}"), 404)["param"] == "response_id"
    assert client.post(path + "/cancel").json()["status"] == "cancelled"
    assert client.get(path).json()["status"] == "cancelled"
    assert rows.job(database, job.id).state == JobState.CANCELLED


def test_an_answer_that_its_length_cut_is_incomplete(client: TestClient, database: Database) -> None:
    with worker(database, outputs=[OUTPUT | {"finish_reason": "length"}]):
        response = Response.model_validate(client.post("/v1/responses", json=ROUTES["/v1/responses"]).json())
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "so\u2028"


def test_the_same_key_is_answered_when_its_model_has_left(client: TestClient, database: Database) -> None:
    database.transact(partial(register, worker_id="gone", model="other", lease_seconds=60.0))
    body, headers = {"model": "other", "input": "hi", "background": True}, {"Idempotency-Key": "gone"}
    first = client.post("/v1/responses", json=body, headers=headers)
    assert first.status_code == 200
    database.transact(partial(leave, worker_id="gone"))
    again = client.post("/v1/responses", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert error_of(client.post("/v1/responses", json=body), 404)["code"] == "model_not_found"
    client.post(f"/v1/responses/{first.json()['id']}/cancel")
