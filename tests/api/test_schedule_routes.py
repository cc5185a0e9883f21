"""Schedules over HTTP: what is accepted and refused, and what a client sees of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from jobs.body import JobBody
from jobs.claims import claim
from jobs.database import Database
from jobs.dialects import now
from jobs.intake import Intake
from jobs.leases import register
from jobs.models import Schedule, Worker
from jobs.settings import Settings
from jobs.tenants import OPERATOR, Tenants
from jobs.terms import Terms, Tier
from jobs.timekeeper import Timekeeper
from tests.api.test_job_routes import error_of

BODY: dict[str, Any] = {
    "name": "nightly",
    "cron": "30 1 * * *",
    "time_zone": "Europe/Berlin",
    "jobs": [
        {"prompt": "a", "max_tokens": 50},
        {
            "messages": [{"role": "user", "content": "b"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ],
}
PACE = {
    "tokens_per_second": 10.0,
    "steps_per_second": 1.0,
    "computed_tokens": 50.0,
    "estimated_tokens": 100.0,
}


def create(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/schedules", json=BODY | fields)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/schedules/{answer.json()['id']}"
    return dict(answer.json())


def measured_worker(database: Database) -> None:
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=600)
        connection.execute(update(Worker).values(pace=PACE))


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "must have at least 1 character"), ("a" * 256, "must have at most 255 characters")],
)
def test_the_length_of_a_name_is_told_in_characters(client: TestClient, name: str, said: str) -> None:
    assert (
        client.post("/v1/schedules", json=BODY | {"name": name}).json()["error"]["message"] == f"name: {said}"
    )
    page = client.get("/v1/jobs", params={"after": "a" * 256}).json()
    assert page["error"]["message"] == "after: must have at most 255 characters"


def test_from_first_to_last(
    client: TestClient, database: Database, settings: Settings, woken: list[str]
) -> None:
    made = create(client, metadata={"k": "v"}, missed="run_once", completion_window="8h")
    address = f"/v1/schedules/{made['id']}"
    with database.read() as connection:
        next_at = connection.scalars(select(Schedule.next_at)).one()
    assert next_at is not None
    assert made == {
        "id": made["id"],
        "object": "schedule",
        "name": "nightly",
        "cron": "30 1 * * *",
        "time_zone": "Europe/Berlin",
        "enabled": True,
        "missed": "run_once",
        "completion_window": "8h",
        "num_jobs": 2,
        "metadata": {"k": "v"},
        "next_run_at": int(next_at),
        "created_at": made["created_at"],
        "updated_at": made["created_at"],
        "deleted_at": None,
        "jobs": None,
    }
    assert client.get(address).json() == made
    assert client.get(address, params={"include": "jobs"}).json()["jobs"] == BODY["jobs"]
    assert client.get("/v1/schedules").json() == {
        "object": "list",
        "data": [made],
        "first_id": made["id"],
        "last_id": made["id"],
        "has_more": False,
    }
    paused = client.patch(address, json={"enabled": False}).json()
    assert (paused["enabled"], paused["next_run_at"]) == (False, None)

    answer = client.post(f"{address}/run")
    assert answer.status_code == 202
    run = answer.json()
    assert answer.headers["location"] == f"/v1/batches/{run['batch_id']}"
    assert (run["object"], run["kind"], run["status"], run["error"]) == (
        "schedule_run",
        "manual",
        "started",
        None,
    )
    assert woken == ["tiny"]
    batch = client.get(answer.headers["location"]).json()
    assert (batch["schedule_id"], batch["metadata"]) == (made["id"], {"k": "v"})
    assert batch["request_counts"]["total"] == 2

    assert client.patch(address, json={"enabled": True}).json()["enabled"] is True
    with database.write() as connection:
        connection.execute(update(Schedule).values(next_at=now() - 4000))
    Tenants(database).change("default", quotas={"queued_jobs": 2})
    assert Timekeeper(database, Intake(database, settings), 60.0, lambda model: None).look() == 1
    runs = client.get(f"{address}/runs").json()
    missed, manual = sorted(runs["data"], key=lambda one: one["fire_time"])
    assert manual == run
    assert (missed["kind"], missed["status"], missed["batch_id"]) == ("catch_up", "refused", None)
    assert missed["error"]["code"] == "quota_exceeded"

    deleted = client.delete(address)
    assert deleted.status_code == 200
    assert deleted.json()["deleted_at"] >= made["created_at"]
    assert client.get("/v1/schedules").json()["data"] == []
    assert client.get(address).json() == deleted.json()
    assert client.get(f"{address}/runs").json() == runs
    assert client.get(f"/v1/batches/{run['batch_id']}").json()["schedule_id"] == made["id"]
    for answer in (client.post(f"{address}/run"), client.patch(address, json={"enabled": True})):
        assert error_of(answer, 404)["param"] == "schedule_id"


def test_a_batch_without_a_schedule_has_none(client: TestClient) -> None:
    batch = client.post("/v1/jobs", json={"jobs": BODY["jobs"]}).json()
    assert (batch["schedule_id"], batch["estimated_completion_at"]) == (None, None)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"cron": None}, "cron", "missing_required_parameter"),
        ({"name": ""}, "name", "invalid_value"),
        ({"name": "a\x00b"}, "name", "invalid_value"),
        ({"name": "a" * 256}, "name", "invalid_value"),
        ({"cron": "61 * * * *"}, "cron", "invalid_value"),
        ({"cron": 5}, "cron", "invalid_type"),
        ({"time_zone": "Berlin"}, "time_zone", "invalid_value"),
        ({"missed": "always"}, "missed", "invalid_value"),
        ({"enabled": "yes"}, "enabled", "invalid_type"),
        ({"completion_window": "24"}, "completion_window", "invalid_value"),
        ({"jobs": []}, "jobs", "invalid_value"),
        ({"jobs": {"prompt": "a"}}, "jobs", "invalid_type"),
        ({"jobs": [{"prompt": "a"}] * 51}, "jobs", "invalid_value"),
        ({"jobs": [{"prompt": "a"}, {"prompt": "a", "n": 0}]}, "jobs[1].n", "invalid_value"),
        ({"jobs": [{"prompt": "a", "tools": []}]}, "jobs[0].tools", "unknown_parameter"),
        (
            {"jobs": [BODY["jobs"][1] | {"chat_template_kwargs": {"loop": 1}}]},
            "jobs[0].chat_template_kwargs.loop",
            "invalid_value",
        ),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
        ({"input_file_id": "file-1"}, "input_file_id", "unknown_parameter"),
        ({"timezone": "UTC"}, "timezone", "unknown_parameter"),
        ({"next_at": 1}, "next_at", "unknown_parameter"),
    ],
)
def test_what_is_refused(front: TestClient, fields: dict[str, Any], param: str, code: str) -> None:
    error = error_of(front.post("/v1/schedules", json=BODY | fields), 400)
    assert (error["param"], error["code"]) == (param, code)


def test_what_a_change_is_refused(client: TestClient) -> None:
    address = f"/v1/schedules/{create(client)['id']}"
    for fields, param in (
        ({}, None),
        ({"cron": None}, "cron"),
        ({"jobs": None}, "jobs"),
        ({"cron": "1 2 3"}, "cron"),
        ({"time_zone": "Berlin"}, "time_zone"),
        ({"id": "x"}, "id"),
        ([], None),
    ):
        assert error_of(client.patch(address, json=fields), 400)["param"] == param, fields
    for path in ("", f"{address[13:]}/runs", address[13:]):
        assert error_of(client.get(f"/v1/schedules{path}?x=1"), 400)["param"] == "x"
        if path:
            assert error_of(client.get(f"/v1/schedules{path}?limit=1&limit=2"), 400)
    assert error_of(client.delete(f"{address}?x=1"), 400)["param"] == "x"
    assert error_of(client.post(f"{address}/run", json={"x": 1}), 400)["param"] == "x"
    for name in ("schedule_unknown", "%00", "x" * 300):
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/run"), ("GET", "/runs"), ("PATCH", "")):
            options: dict[str, Any] = {"json": {"enabled": True}} if method == "PATCH" else {}
            answer = client.request(method, f"/v1/schedules/{name}{path}", **options)
            assert error_of(answer, 404)["code"] == "not_found"


def test_without_a_model_to_guess_jobs_must_name_one(client: TestClient, database: Database) -> None:
    from api.app import create_app
    from tests.support.clients import local_client

    with local_client(create_app(Settings(), database)) as nameless:
        error = error_of(nameless.post("/v1/schedules", json=BODY), 400)
        assert (error["param"], error["code"]) == ("jobs[0].model", "missing_required_parameter")
        jobs = [{"prompt": "a", "model": "m"}]
        assert nameless.post("/v1/schedules", json=BODY | {"jobs": jobs}).status_code == 201


def test_a_large_template_is_taken_and_a_large_change_too(client: TestClient, settings: Settings) -> None:
    jobs = [{"prompt": "x" * 900}] * 20
    made = create(client, jobs=jobs)
    assert made["num_jobs"] == 20
    address = f"/v1/schedules/{made['id']}"
    assert client.patch(address, json={"jobs": jobs + jobs}).json()["num_jobs"] == 40
    answer = client.patch(address, json={"metadata": {"k": "x" * settings.max_body_bytes}})
    assert error_of(answer, 413)["code"] == "body_too_large"


def test_a_run_that_is_sent_again_starts_once(client: TestClient) -> None:
    made, other = create(client), create(client, name="other")
    headers = {"Idempotency-Key": "tonight"}
    first, again = (client.post(f"/v1/schedules/{made['id']}/run", headers=headers) for _ in range(2))
    assert first.json() == again.json()
    assert len(client.get(f"/v1/schedules/{made['id']}/runs").json()["data"]) == 1
    answer = client.post(f"/v1/schedules/{other['id']}/run", headers=headers)
    assert error_of(answer, 422)["code"] == "idempotency_key_reused"


def test_a_name_that_is_taken(client: TestClient) -> None:
    create(client)
    error = error_of(client.post("/v1/schedules", json=BODY), 400)
    assert (error["param"], error["code"]) == ("name", "name_taken")


def test_a_tiny_window_behind_a_big_queue(client: TestClient, database: Database, settings: Settings) -> None:
    measured_worker(database)
    urgent = Terms(tier=Tier.URGENT)  # what waits without a deadline would give way
    jobs = [JobBody(prompt="a" * 40, max_tokens=90)] * 40
    batch_id = Intake(database, settings).accept_many(jobs, OPERATOR, terms=urgent)
    big = client.get(f"/v1/batches/{batch_id}").json()
    tight = create(client, completion_window="60s")
    answer = client.post(f"/v1/schedules/{tight['id']}/run")
    error = error_of(answer, 429)
    assert (error["code"], error["param"]) == ("window_cannot_be_met", "completion_window")
    # counted from when the queue was last looked at, which may be a moment ago
    assert re.search(r"window of 6[01] seconds cannot", error["message"])
    assert 100 < int(answer.headers["retry-after"]) < 300
    assert answer.headers["x-should-retry"] == "false", "no client waits for so long by itself"
    assert client.get(f"/v1/schedules/{tight['id']}/runs").json()["data"] == []
    client.patch(f"/v1/schedules/{tight['id']}", json={"completion_window": None})
    answer = client.post(f"/v1/schedules/{tight['id']}/run")
    assert answer.status_code == 202
    later = client.get(answer.headers["location"]).json()
    assert later["estimated_completion_at"] >= big["estimated_completion_at"]


def test_the_answer_to_a_submit_says_when(client: TestClient, database: Database) -> None:
    batch = client.post("/v1/jobs", json={"jobs": [{"prompt": "a" * 40, "max_tokens": 90}] * 40}).json()
    assert batch["estimated_completion_at"] is None
    measured_worker(database)
    jobs = {"jobs": [{"prompt": "a" * 40, "max_tokens": 90}] * 40}
    batch = client.post("/v1/jobs", json=jobs).json()
    assert 190 <= batch["estimated_completion_at"] - batch["created_at"] <= 420
    job = client.post("/v1/jobs", json={"prompt": "a" * 40, "max_tokens": 90}).json()
    assert job["estimated_completion_at"] - job["created_at"] >= 190
    listed = client.get("/v1/jobs", params={"limit": 1}).json()["data"]
    assert listed[0]["estimated_completion_at"] is not None
    with database.write() as connection:
        (held,) = claim(connection, worker_id="w", model="tiny", limit=1)
    assert client.get(f"/v1/jobs/{held.job_id}").json()["estimated_completion_at"] is not None
    cancelled = client.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert cancelled["estimated_completion_at"] is None
