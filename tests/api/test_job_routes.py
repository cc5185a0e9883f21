"""POST, GET and cancel of jobs over HTTP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import or_, select

from api.app import create_app
from jobs.claims import claim
from jobs.database import Database
from jobs.leases import register
from jobs.models import Job
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.terms import DELAYED, Tier
from tests.support.clients import local_client
from tests.support.waiting import wait_until

OUTPUT = {"index": 0, "text": "out\x00\u2028", "finish_reason": "stop", "stop_reason": "\n"}
LIKELIEST = {"token": "\x00", "bytes": [0], "logprob": -0.5}
LOGPROBS = {
    "content": [{"token": "<eos>", "bytes": None, "logprob": -9999.0, "top_logprobs": [LIKELIEST]}],
    "refusal": None,
}


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer, after checking everything that all of them have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["message"]
    assert error["code"]
    return dict(error)


def take(database: Database) -> list[Any]:
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)
        return claim(connection, worker_id="w", model="tiny", limit=100)


def test_one_job_is_accepted(client: TestClient, woken: list[str]) -> None:
    body = {"prompt": "a", "custom_id": "c", "metadata": {"k": "v"}, "temperature": 0}
    answer = client.post("/v1/jobs", json=body)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job == {
        "id": job["id"],
        "object": "job",
        "status": "queued",
        "model": "tiny",
        "batch_id": None,
        "custom_id": "c",
        "metadata": {"k": "v"},
        "created_at": job["created_at"],
        "started_at": None,
        "finished_at": None,
        "estimated_completion_at": None,
        "unserved_models": ["tiny"],
        "outputs": None,
        "usage": None,
        "error": None,
        "attempts": 0,
        "retry_of": None,
        "tier": "normal",
        "priority": 0,
        "not_before": None,
        "deadline": None,
    }
    assert isinstance(job["created_at"], int)
    assert client.get(answer.headers["location"]).json() == job
    assert woken == ["tiny"]


def test_what_a_chat_tells_its_template_reaches_the_worker_and_tells_submits_apart(
    client: TestClient, database: Database
) -> None:
    given = {"enable_thinking": False, "effort": "low", "budget": 2**62, "share": 0.1, "nothing": None}
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": given}
    headers = {"Idempotency-Key": "a night without thoughts"}
    assert client.post("/v1/jobs", json=body, headers=headers).status_code == 202
    assert client.post("/v1/jobs", json={"jobs": [body]}).status_code == 202
    assert [item.body["chat_template_kwargs"] for item in take(database)] == [given, given]
    body["chat_template_kwargs"] = given | {"enable_thinking": True}
    error = error_of(client.post("/v1/jobs", json=body, headers=headers), 422)
    assert error["code"] == "idempotency_key_reused"


def test_a_completed_job_has_outputs_and_usage(client: TestClient, database: Database) -> None:
    job_id = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    (claimed,) = take(database)
    outcome = Outcome(
        job_id=job_id,
        fence=claimed.fence,
        kind="completed",
        outputs=[
            OUTPUT | {"reasoning": "hm", "reasoning_tokens": 5},
            OUTPUT | {"index": 1, "logprobs": LOGPROBS},
        ],
        prompt_tokens=3,
        completion_tokens=9,
        cached_tokens=1,
    )
    database.transact(lambda connection: record(connection, worker_id="w", outcomes=[outcome]))
    job = client.get(f"/v1/jobs/{job_id}").json()
    outputs = [
        OUTPUT | {"logprobs": None, "reasoning": "hm"},
        OUTPUT | {"index": 1, "logprobs": LOGPROBS, "reasoning": None},
    ]
    assert (job["status"], job["outputs"], job["attempts"]) == ("completed", outputs, 1)
    assert job["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 9,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]


def test_a_failed_job_has_its_error(client: TestClient, database: Database) -> None:
    job_id = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    (claimed,) = take(database)
    outcome = Outcome(
        job_id=job_id, fence=claimed.fence, kind="failed", error={"code": "numerics", "message": "NaN"}
    )
    database.transact(lambda connection: record(connection, worker_id="w", outcomes=[outcome]))
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["outputs"], job["usage"]) == ("failed", None, None)
    assert job["error"] == {"code": "numerics", "message": "NaN", "param": None}


def test_a_batch_is_accepted_in_order(client: TestClient, woken: list[str]) -> None:
    jobs: list[dict[str, Any]] = [{"prompt": "a", "custom_id": f"c{i}"} for i in range(50)]
    jobs[7]["model"] = "other"
    answer = client.post("/v1/jobs", json={"jobs": jobs, "metadata": {"night": "monday"}})
    assert answer.status_code == 202
    batch = answer.json()
    assert answer.headers["location"] == f"/v1/batches/{batch['id']}"
    assert (batch["object"], batch["endpoint"], batch["input_file_id"]) == ("batch", "/v1/jobs", None)
    assert (batch["status"], batch["metadata"]) == ("in_progress", {"night": "monday"})
    assert batch["request_counts"] == {"total": 50, "completed": 0, "failed": 0}
    assert sorted(woken) == ["other", "tiny"]
    page = client.get("/v1/jobs", params={"batch_id": batch["id"], "limit": 100, "order": "asc"}).json()
    assert [job["custom_id"] for job in page["data"]] == [f"c{i}" for i in range(50)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"jobs": []}, "jobs"),
        ({"jobs": {}}, "jobs"),
        ({"jobs": None}, "jobs"),
        ({"jobs": [{"prompt": "a"}] * 51}, "jobs"),
        ({"jobs": [{"prompt": "a"}, 3]}, "jobs[1]"),
        ({"jobs": [{"prompt": "a"}] * 17 + [{"prompt": "a", "temperature": 3}]}, "jobs[17].temperature"),
        ({"jobs": [{"messages": [{"role": "user"}]}]}, "jobs[0].messages[0].content"),
        ({"jobs": [{"prompt": "a", "\ud800": 1}]}, "jobs[0]"),
        ({"jobs": [{"prompt": "a", "chat_template_kwargs": {}}]}, "jobs[0].chat_template_kwargs"),
        ({"jobs": [{"prompt": "a"}], "prompt": "b"}, "prompt"),
        ({"jobs": [{"prompt": "a"}], "\x00": 1}, "\\x00"),
        ({"jobs": [{"prompt": "a"}], "metadata": {"k": 1}}, "metadata.k"),
        ({"prompt": "a", "unknown": 1}, "unknown"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"prompt": "a\ud800"}, "prompt"),
        ([], None),
        ("text", None),
        (None, None),
    ],
)
def test_a_bad_body_is_refused_whole_and_named(front: TestClient, body: Any, param: str | None) -> None:
    content = json.dumps(body)
    answer = front.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["param"] == param
    assert front.get("/v1/jobs").json()["data"] == []


def test_a_job_without_a_model_where_none_is_served(database: Database, tmp_path: Path) -> None:
    with local_client(create_app(Settings(data_dir=tmp_path), database)) as client:
        assert error_of(client.post("/v1/jobs", json={"prompt": "a"}), 400)["param"] == "model"
        jobs = {"jobs": [{"prompt": "a", "model": "m"}, {"prompt": "a"}]}
        assert error_of(client.post("/v1/jobs", json=jobs), 400)["param"] == "jobs[1].model"
        assert client.post("/v1/jobs", json={"prompt": "a", "model": "m"}).status_code == 202


def test_a_dead_broker_fails_no_submit(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    def dead(model: str) -> None:
        raise ConnectionError("no Redis")

    with local_client(create_app(settings, database, dead)) as client:
        assert client.post("/v1/jobs", json={"prompt": "a"}).status_code == 202
        assert client.post("/v1/jobs", json={"jobs": [{"prompt": "a"}]}).status_code == 202
        forged = "m\n2026-01-01 ERROR jobs.worker worker.lost" + "y" * 200
        assert client.post("/v1/jobs", json={"prompt": "a", "model": forged}).status_code == 202
    *_, line = [message for message in caplog.messages if "wake_failed" in message]
    assert line.startswith("api.wake_failed model='m\\n2026")
    assert line.isprintable()
    assert len(line) < 150


def test_pages(client: TestClient) -> None:
    assert client.get("/v1/jobs").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    ids = [client.post("/v1/jobs", json={"prompt": "a"}).json()["id"] for _ in range(7)]
    seen: list[str] = []
    params: dict[str, Any] = {"limit": 3}
    while True:
        page = client.get("/v1/jobs", params=params).json()
        seen += [job["id"] for job in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        params["after"] = page["last_id"]
    assert sorted(seen) == sorted(ids)
    assert len(seen) == 7


def test_filters(client: TestClient) -> None:
    batch = client.post("/v1/jobs", json={"jobs": [{"prompt": "a", "custom_id": "c"}]}).json()
    job = client.post("/v1/jobs", json={"prompt": "a", "model": "other"}).json()
    client.post(f"/v1/jobs/{job['id']}/cancel")

    def found(**params: Any) -> list[str]:
        return [one["model"] for one in client.get("/v1/jobs", params=params).json()["data"]]

    assert found(status="cancelled") == ["other"]
    assert found(model="other") == ["other"]
    assert found(batch_id=batch["id"]) == ["tiny"]
    assert found(custom_id="c", status="queued") == ["tiny"]
    assert len(found(created_after=job["created_at"] - 60, created_before=job["created_at"] + 60)) == 2
    assert found(created_after=job["created_at"] + 60) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("foo=1", "foo"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=1&limit=2", "limit"),
        ("status=done", "status"),
        ("order=up", "order"),
        ("after=job_unknown", "after"),
        ("after=%00", "after"),
        ("model=%00", "model"),
        ("model=", "model"),
        ("custom_id=" + "c" * 513, "custom_id"),
        ("batch_id=" + "b" * 256, "batch_id"),
        ("created_after=nan", "created_after"),
        ("created_after=inf", "created_after"),
        ("created_before=-1", "created_before"),
        ("created_before=today", "created_before"),
        ("%00=1", "\\x00"),
    ],
)
def test_a_bad_query_is_named(front: TestClient, query: str, param: str) -> None:
    error = error_of(front.get(f"/v1/jobs?{query}"), 400)
    assert error["param"] == param
    assert " should " not in error["message"], "it must"


def test_cancel(client: TestClient, database: Database) -> None:
    job_id = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    answer = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert client.post(f"/v1/jobs/{job_id}/cancel", json={}).json()["status"] == "cancelled"
    job_id = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    take(database)
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelling"
    assert error_of(client.post(f"/v1/jobs/{job_id}/cancel", json={"force": 1}), 400)["param"] == "force"
    assert error_of(client.post(f"/v1/jobs/{job_id}/cancel", json=[1]), 400)


@pytest.mark.parametrize("job_id", ["job_unknown", "%00", "a%0Ab", "x" * 300, "%ff", "..%2f", "%F0%9F%8C%99"])
def test_an_unknown_job_is_not_found(client: TestClient, job_id: str) -> None:
    assert error_of(client.get(f"/v1/jobs/{job_id}"), 404)["code"] == "not_found"
    assert error_of(client.post(f"/v1/jobs/{job_id}/cancel"), 404)["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/jobs?x=1"), ("GET", "/v1/jobs/job_1?x=1"), ("POST", "/v1/jobs/job_1/cancel?x=1")],
)
def test_query_parameters_that_nobody_reads_are_refused(front: TestClient, method: str, path: str) -> None:
    assert error_of(front.request(method, path), 400)["param"] == "x"


@pytest.mark.parametrize(
    "body", [{"prompt": "a"}, {"jobs": [{"prompt": "a"}, {"prompt": "b"}]}], ids=["job", "batch"]
)
def test_a_submit_that_is_sent_again_is_accepted_once(client: TestClient, body: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "night 7"}
    first = client.post("/v1/jobs", json=body, headers=headers)
    again = client.post("/v1/jobs", json=body, headers=headers)
    assert first.status_code == again.status_code == 202
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert len(client.get("/v1/jobs").json()["data"]) == len(body.get("jobs", "1"))

    answer = client.post("/v1/jobs", json={"prompt": "something else"}, headers=headers)
    error = error_of(answer, 422)
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "idempotency-key")
    assert answer.headers["x-should-retry"] == "false"

    client.post(f"{first.headers['location']}/cancel")
    later = client.post("/v1/jobs", json=body, headers=headers)  # what it has become since
    assert (later.status_code, later.json()["id"]) == (202, first.json()["id"])
    assert later.json()["status"] == "cancelled"


def test_a_key_of_a_submit_must_be_one(client: TestClient) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    assert (
        error_of(client.post("/v1/jobs", json={"prompt": "a"}, headers=headers), 400)["code"]
        == "invalid_header"
    )
    long = {"Idempotency-Key": "k" * 256}
    error = error_of(client.post("/v1/jobs", json={"prompt": "a"}, headers=long), 400)
    assert (error["code"], error["param"]) == ("invalid_header", "idempotency-key")
    assert client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    "body", [{"prompt": "a"}, {"jobs": [{"prompt": "a"}, {"prompt": "b"}]}], ids=["job", "batch"]
)
def test_a_submit_that_is_sent_again_after_its_deadline_is_answered(
    client: TestClient, body: dict[str, Any]
) -> None:
    headers = {"Idempotency-Key": "night 8"}
    dated = body | {"deadline": time.time() + 2}
    first = client.post("/v1/jobs", json=dated, headers=headers)
    wait_until(lambda: time.time() > dated["deadline"], "the deadline has passed")
    again = client.post("/v1/jobs", json=dated, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert error_of(client.post("/v1/jobs", json=dated), 400)["param"] == "deadline"


@pytest.mark.parametrize("hours", [2, -2])
@pytest.mark.parametrize("door", ["job", "batch"])
def test_moments_go_by_the_databases_clock_wherever_the_apis_may_stand(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch, door: str, hours: float
) -> None:
    true = time.time()
    monkeypatch.setattr(time, "time", lambda at=time.time: at() + 3_600 * hours)

    def submitted(**terms: Any) -> Any:
        body = {"prompt": "a"} if door == "job" else {"jobs": [{"prompt": "a"}]}
        made = client.post("/v1/jobs", json=body | terms).json()
        with database.read() as connection:
            made_of_it = or_(Job.id == made["id"], Job.batch_id == made["id"])
            return connection.execute(select(*Job.__table__.columns).where(made_of_it)).one()

    assert submitted(completion_window="90m").deadline == pytest.approx(true + 5_400, abs=60)
    assert submitted(deadline=true + 3_600).deadline == true + 3_600
    later = submitted(not_before=true + 3_600)
    assert (later.not_before, later.tier) == (true + 3_600, Tier.NORMAL + DELAYED)
    past = client.post("/v1/jobs", json={"prompt": "a", "deadline": true - 3_600})
    assert error_of(past, 400)["param"] == "deadline"
