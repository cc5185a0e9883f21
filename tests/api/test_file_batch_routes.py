"""Batches of files over HTTP: create, follow, list, cancel, and what is refused."""

from __future__ import annotations

import json
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import update

from jobs.clerk import Clerk
from jobs.database import Database
from jobs.models import Batch
from jobs.settings import Settings
from tests.api.test_file_routes import send
from tests.api.test_job_routes import error_of
from tests.support.batch_lines import CHAT, chat_line, jsonl, run


def a_batch(client: TestClient, content: bytes, **change: Any) -> Any:
    wish = {
        "input_file_id": send(client, content).json()["id"],
        "endpoint": CHAT,
        "completion_window": "24h",
        "metadata": {"night": "1"},
    }
    return client.post("/v1/batches", json=wish | change)


def test_a_batch_of_a_file(client: TestClient, database: Database, settings: Settings) -> None:
    clerk = Clerk(database, settings, lambda model: None)
    made = a_batch(client, jsonl([chat_line(i) for i in range(3)])).json()
    assert (made["status"], made["metadata"], made["in_progress_at"]) == ("validating", {"night": "1"}, None)
    assert made["expires_at"] - made["created_at"] in (86_399, 86_400)
    error = error_of(client.delete(f"/v1/files/{made['input_file_id']}"), 409)
    assert error["code"] == "file_in_use"
    assert client.delete(f"/v1/files/{made['input_file_id']}").headers["x-should-retry"] == "false"
    while clerk.work_once():
        pass
    run(database, failing=["line-1"])
    while clerk.work_once():
        pass
    done = client.get(f"/v1/batches/{made['id']}").json()
    assert (done["status"], done["model"]) == ("completed", "tiny")
    assert done["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert done["usage"]["total_tokens"] == 16
    assert done["created_at"] <= done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    text = client.get(f"/v1/files/{done['output_file_id']}/content").text
    assert [json.loads(line)["custom_id"] for line in text.splitlines()] == ["line-0", "line-2"]
    refused = client.post(f"/v1/batches/{made['id']}/cancel")
    assert error_of(refused, 409)["code"] == "batch_closed"
    assert refused.headers["x-should-retry"] == "false"
    assert client.delete(f"/v1/files/{made['input_file_id']}").status_code == 200
    assert [one["id"] for one in client.get("/v1/files").json()["data"]] == [
        done["error_file_id"],
        done["output_file_id"],
    ]


def test_errors_of_lines(client: TestClient, database: Database, settings: Settings) -> None:
    made = a_batch(client, b"{}\n").json()
    Clerk(database, settings, lambda model: None).work_once()
    failed = client.get(f"/v1/batches/{made['id']}").json()
    assert (failed["status"], failed["errors"]["object"]) == ("failed", "list")
    (error,) = failed["errors"]["data"]
    assert (error["line"], error["code"], error["param"]) == (1, "invalid_request", "custom_id")
    assert failed["failed_at"] >= failed["created_at"]


def test_refusals_and_the_key(client: TestClient) -> None:
    error = error_of(a_batch(client, b"", input_file_id="file-abc"), 404)
    assert (error["message"], error["param"]) == ("No such File object: file-abc", "input_file_id")
    assert error_of(a_batch(client, b"", endpoint="/v1/embeddings"), 400)["param"] == "endpoint"
    assert error_of(client.post("/v1/batches", json=[]), 400)
    assert error_of(client.post("/v1/batches", json={}), 400)["param"] == "input_file_id"
    assert error_of(client.post("/v1/batches?x=1", json={}), 400)["param"] == "x"
    wish = {"input_file_id": send(client, b"").json()["id"], "endpoint": CHAT, "completion_window": "1h"}
    headers = {"Idempotency-Key": "night"}
    first, second = (client.post("/v1/batches", json=wish, headers=headers).json() for _ in range(2))
    assert first["id"] == second["id"]
    other = client.post("/v1/batches", json=wish | {"completion_window": "2h"}, headers=headers)
    assert error_of(other, 422)["code"] == "idempotency_key_reused"
    assert len(client.get("/v1/batches").json()["data"]) == 1


def test_pages_of_batches(client: TestClient) -> None:
    ids = [a_batch(client, b"").json()["id"] for _ in range(4)]
    array = client.post("/v1/jobs", json={"jobs": [{"prompt": "a"}]}).json()
    page = client.get("/v1/batches?limit=2").json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([array["id"], ids[3]], True)
    assert array["unserved_models"] == ["tiny"]
    assert page["data"][0] == array | {"unserved_models": None}  # a list looks at no queue
    rest = client.get(f"/v1/batches?after={ids[3]}").json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2::-1], False)
    client.post(f"/v1/batches/{ids[1]}/cancel")
    found = client.get("/v1/batches?status=cancelled").json()["data"]
    assert [one["id"] for one in found] == [ids[1]]
    assert client.get("/v1/batches?created_before=5").json()["data"] == []
    assert len(client.get("/v1/batches?created_after=5").json()["data"]) == 5
    for query, param in (
        ("limit=101", "limit"),
        ("status=x", "status"),
        ("after=batch_x", "after"),
        ("y=1", "y"),
    ):
        assert error_of(client.get(f"/v1/batches?{query}"), 400)["param"] == param


def test_a_batch_whose_time_is_over_before_its_first_job(
    client: TestClient, database: Database, settings: Settings
) -> None:
    made = a_batch(client, jsonl([chat_line(i) for i in range(3)])).json()
    with database.write() as connection:
        connection.execute(update(Batch).values(expires_at=1.0))
    clerk = Clerk(database, settings, lambda model: None)
    while clerk.work_once():
        pass
    late = client.get(f"/v1/batches/{made['id']}").json()
    assert late["status"] == "expired"
    assert late["request_counts"] == {"total": 3, "completed": 0, "failed": 3}
    assert late["expired_at"] >= late["created_at"]
    text = client.get(f"/v1/files/{late['error_file_id']}/content").text
    assert text.count("batch_expired") == 3
