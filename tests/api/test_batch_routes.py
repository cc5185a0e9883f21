"""Batches over HTTP: counts, usage, streamed results, cancel."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Batch

from jobs.claims import claim
from jobs.database import Database
from jobs.leases import register
from jobs.outcomes import Outcome, record
from tests.api.test_job_routes import error_of


def submit(client: TestClient, count: int) -> str:
    jobs = [{"prompt": "a", "custom_id": str(i)} for i in range(count)]
    return str(client.post("/v1/jobs", json={"jobs": jobs}).json()["id"])


def run(database: Database, limit: int, text: str = "out") -> None:
    with database.write() as connection:
        claims = claim(connection, worker_id="w", model="tiny", limit=limit)
        outcomes = [
            Outcome(
                job_id=one.job_id,
                fence=one.fence,
                kind="completed",
                outputs=[{"index": 0, "text": text, "finish_reason": "length", "stop_reason": None}],
                prompt_tokens=3,
                completion_tokens=5,
                cached_tokens=2,
            )
            for one in claims
        ]
        record(connection, worker_id="w", outcomes=outcomes)


def lines(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/jsonl")
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture(autouse=True)
def worker(database: Database) -> None:
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)


def test_counts_and_usage_while_it_runs_and_after(client: TestClient, database: Database) -> None:
    batch_id = submit(client, 4)
    run(database, 3)
    with database.write() as connection:
        (held,) = claim(connection, worker_id="w", model="tiny", limit=1)
    batch = client.get(f"/v1/batches/{batch_id}").json()
    assert batch["status"] == "in_progress"
    assert batch["request_counts"] == {"total": 4, "completed": 3, "failed": 0}
    assert batch["job_counts"] == {
        "queued": 0,
        "in_progress": 1,
        "cancelling": 0,
        "completed": 3,
        "failed": 0,
        "cancelled": 0,
        "expired": 0,
    }
    assert batch["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 6},
        "output_tokens": 15,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 24,
    }
    assert batch["completed_at"] is None
    outcome = Outcome(
        job_id=held.job_id, fence=held.fence, kind="failed", error={"code": "numerics", "message": "NaN"}
    )
    database.transact(lambda connection: record(connection, worker_id="w", outcomes=[outcome]))
    batch = client.get(f"/v1/batches/{batch_id}").json()
    assert (batch["status"], batch["request_counts"]["failed"]) == ("completed", 1)
    assert batch["completed_at"] >= batch["created_at"]
    assert batch["usage"]["total_tokens"] == 24, "a failed job is not billed"


def test_openais_own_class_reads_a_batch(client: TestClient) -> None:
    data = client.get(f"/v1/batches/{submit(client, 2)}").json()
    batch = Batch.construct(**data)
    assert (batch.status, batch.request_counts.total) == ("in_progress", 2)  # type: ignore[union-attr]
    assert batch.usage is not None
    assert not set(Batch.model_fields) - set(data)


def test_results_while_running_and_after(client: TestClient, database: Database) -> None:
    batch_id = submit(client, 6)
    answer = client.get(f"/v1/batches/{batch_id}/results")
    assert lines(answer) == []
    assert answer.headers["x-incomplete"] == "true"
    run(database, 4, text="line one\nline two\u2028\x85 three")
    answer = client.get(f"/v1/batches/{batch_id}/results")
    found = lines(answer)
    assert answer.headers["x-incomplete"] == "true"
    assert [job["custom_id"] for job in found] == ["0", "1", "2", "3"]
    assert found[0]["outputs"][0]["text"] == "line one\nline two\u2028\x85 three"
    assert found[0] == client.get(f"/v1/jobs/{found[0]['id']}").json()
    run(database, 4)
    answer = client.get(f"/v1/batches/{batch_id}/results")
    assert "x-incomplete" not in answer.headers
    assert [job["custom_id"] for job in lines(answer)] == ["0", "1", "2", "3", "4", "5"]


def test_results_larger_than_a_piece_arrive_whole(client: TestClient, database: Database) -> None:
    batch_id = submit(client, 50)
    run(database, 50, text="x" * 5_000)
    found = lines(client.get(f"/v1/batches/{batch_id}/results"))
    assert [job["custom_id"] for job in found] == [str(i) for i in range(50)]
    assert {job["outputs"][0]["text"] for job in found} == {"x" * 5_000}


def test_cancel_of_a_waiting_and_of_a_running_batch(client: TestClient, database: Database) -> None:
    batch_id = submit(client, 3)
    batch = client.post(f"/v1/batches/{batch_id}/cancel").json()
    assert (batch["status"], batch["job_counts"]["cancelled"]) == ("cancelled", 3)
    assert batch["cancelling_at"] <= batch["cancelled_at"]
    assert [job["status"] for job in lines(client.get(f"/v1/batches/{batch_id}/results"))] == [
        "cancelled"
    ] * 3

    batch_id = submit(client, 3)
    with database.write() as connection:
        (held,) = claim(connection, worker_id="w", model="tiny", limit=1)
    batch = client.post(f"/v1/batches/{batch_id}/cancel").json()
    assert (batch["status"], batch["cancelled_at"]) == ("cancelling", None)
    assert batch["job_counts"]["cancelling"] == 1
    outcome = Outcome(job_id=held.job_id, fence=held.fence, kind="released", completion_tokens=3)
    database.transact(lambda connection: record(connection, worker_id="w", outcomes=[outcome]))
    batch = client.post(f"/v1/batches/{batch_id}/cancel").json()
    assert (batch["status"], batch["usage"]["total_tokens"]) == ("cancelled", 0)


@pytest.mark.parametrize("path", ["", "/results", "/cancel"])
@pytest.mark.parametrize("batch_id", ["batch_unknown", "%00", "x" * 300])
def test_an_unknown_batch_is_not_found(client: TestClient, batch_id: str, path: str) -> None:
    method = "POST" if path == "/cancel" else "GET"
    assert error_of(client.request(method, f"/v1/batches/{batch_id}{path}"), 404)["code"] == "not_found"
    error = error_of(client.request(method, f"/v1/batches/{batch_id}{path}?x=1"), 400)
    assert error["param"] == "x"
