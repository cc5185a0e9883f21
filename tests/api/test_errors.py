"""Whatever happens, the answer is the envelope, and it tells nothing that is not the client's."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from api.app import create_app
from jobs.database import Database
from jobs.leases import register
from jobs.settings import Settings
from jobs.states import WorkerState
from tests.api.test_job_routes import error_of
from tests.support.clients import local_client
from tests.support.databases import let_write

SECRET = "the launch code is 1234"


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/job", "/v1/jobs/", "/docs", "/v1/batch", "/%00", "/metrics/"]
)
def test_an_unknown_route(front: TestClient, path: str) -> None:
    assert error_of(front.get(path), 404)["code"] == "not_found"


def test_an_unknown_route_is_named(front: TestClient) -> None:
    assert error_of(front.get("/v1/v1/jobs"), 404)["message"] == "there is no route /v1/v1/jobs"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/jobs", "GET, POST, HEAD"),
        ("DELETE", "/v1/jobs/job_1", "GET, HEAD"),
        ("GET", "/v1/jobs/job_1/cancel", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("OPTIONS", "/v1/files/file-1", "GET, DELETE, HEAD"),
        ("PUT", "/v1/schedules/schedule_1", "GET, PATCH, DELETE, HEAD"),
        ("DELETE", "/v1/models/a/b", "GET, HEAD"),
    ],
)
def test_a_method_that_is_not_allowed(front: TestClient, method: str, path: str, allowed: str) -> None:
    answer = front.request(method, path)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/v1/jobs", "/v1/jobs/job_1", "/v1/models", "/metrics", "/no"]
)
def test_head_is_get_without_a_body(front: TestClient, path: str) -> None:
    got, asked = front.get(path), front.head(path)
    assert asked.status_code == got.status_code
    assert asked.headers["content-type"] == got.headers["content-type"]
    assert asked.content == b""


def test_head_of_what_only_takes_post(front: TestClient) -> None:
    answer = front.head("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "POST", b"")


def test_every_answer_has_its_own_request_id(front: TestClient) -> None:
    ids = {front.get(path).headers["x-request-id"] for path in ("/health", "/ready", "/nope", "/v1/jobs")}
    assert len(ids) == 4


def test_an_unforeseen_failure_tells_nothing(
    client: TestClient, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A table without the column that is written: nothing in the API expects that."""
    with database.write() as connection:
        connection.execute(text("ALTER TABLE jobs RENAME COLUMN custom_id TO other"))
    with caplog.at_level(logging.INFO):
        answer = client.post("/v1/jobs", json={"prompt": SECRET, "custom_id": SECRET})
    error = error_of(answer, 503 if database.is_sqlite else 500)
    assert "custom_id" not in answer.text
    assert SECRET not in answer.text
    assert "SELECT" not in answer.text
    assert answer.headers["x-request-id"] in caplog.text
    assert SECRET not in caplog.text
    assert error["param"] is None


def test_an_error_in_the_code_is_a_plain_500(database: Database, settings: Settings, caplog: Any) -> None:
    app = create_app(settings, database)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError(SECRET)

    with local_client(app) as client, caplog.at_level(logging.INFO):
        answer = client.get("/broken")
    assert error_of(answer, 500)["code"] == "internal_error"
    assert SECRET not in answer.text + caplog.text
    assert "RuntimeError" in caplog.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


def test_a_database_that_is_gone_is_a_503(caplog: pytest.LogCaptureFixture) -> None:
    """And the log says why, for whoever is woken by it."""
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    with local_client(create_app(Settings(model="tiny"), database)) as client:
        for path in ("/v1/jobs", "/v1/jobs/job_1", "/v1/batches/batch_1", "/ready"):
            answer = client.get(path)
            assert error_of(answer, 503)["code"] == "database_unreachable"
            assert answer.headers["retry-after"]
            assert "refused" not in answer.text
        assert client.get("/health").json() == {"status": "ok"}
    said = [record.getMessage() for record in caplog.records if "api.database_unreachable" in record.msg]
    assert len(said) == 4
    assert all("OperationalError reason=" in line and "refused" in line for line in said)
    database.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_database_that_only_reads_is_a_503_until_it_writes_again(
    client: TestClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Database.transact.__kwdefaults__, "patience", 0.1)
    let_write(database_url, False)
    bodies = ({"prompt": "a"}, {"jobs": [{"prompt": "a"}]})
    for body in bodies:
        answer = client.post("/v1/jobs", json=body)
        assert error_of(answer, 503)["code"] == "database_unreachable"
        assert answer.headers["retry-after"]
    assert client.get("/v1/jobs").json()["data"] == [], "what is there can be read all the same"
    let_write(database_url, True)
    assert [client.post("/v1/jobs", json=body).status_code for body in bodies] == [202, 202]


def test_health_and_ready(client: TestClient, database: Database) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready", "has_work": False, "workers": {}, "models": []}
    client.post("/v1/jobs", json={"prompt": "a"})
    error = error_of(client.get("/ready"), 503)
    assert error["code"] == "not_ready"
    assert "no worker" in error["message"]
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)
        connection.execute(text("UPDATE workers SET state = :ready"), {"ready": WorkerState.READY})
    assert client.get("/ready").json() == {
        "status": "ready",
        "has_work": True,
        "workers": {"ready": 1},
        "models": ["tiny"],
    }
    for path in ("/health", "/ready"):
        assert error_of(client.get(f"{path}?x=1"), 400)["param"] == "x"


def test_the_schema_can_be_made(front: TestClient) -> None:
    schema = front.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/batches",
        "/v1/batches/{batch_id}",
        "/v1/batches/{batch_id}/results",
        "/v1/batches/{batch_id}/cancel",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/jobs/{job_id}/retry",
        "/v1/batches/{batch_id}/retry",
        "/v1/usage",
        "/metrics",
        "/v1/schedules",
        "/v1/schedules/{schedule_id}",
        "/v1/schedules/{schedule_id}/run",
        "/v1/schedules/{schedule_id}/runs",
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/health",
        "/ready",
    }
