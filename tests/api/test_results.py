"""Results of a batch over HTTP: whole, or in pages with a cursor; and retries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from jobs.claims import claim
from jobs.database import Database
from jobs.leases import register
from jobs.outcomes import Outcome, record
from tests.api.test_batch_routes import lines, submit
from tests.api.test_job_routes import error_of
from tests.support.clients import bearer, key_of


@pytest.fixture
def worker(database: Database) -> None:
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)


def end(database: Database, limit: int, kind: str = "completed") -> list[str]:
    """So many jobs end in the order of the queue; their ids."""
    with database.write() as connection:
        claims = claim(connection, worker_id="w", model="tiny", limit=limit)
        outcomes = [
            Outcome(
                job_id=one.job_id,
                fence=one.fence,
                kind=kind,  # type: ignore[arg-type]
                outputs=[{"index": 0, "text": "out", "finish_reason": "stop", "stop_reason": None}],
                error={"code": "numerics", "message": "NaN"},
                prompt_tokens=3,
                completion_tokens=5,
            )
            for one in claims
        ]
        record(connection, worker_id="w", outcomes=outcomes)
    return [one.job_id for one in claims]


def pages(client: TestClient, batch_id: str, **params: Any) -> Iterator[list[str]]:
    """Custom ids of page after page, until nothing will follow."""
    more = True
    while more:
        answer = client.get(f"/v1/batches/{batch_id}/results", params=params)
        yield [line["custom_id"] for line in lines(answer)]
        params["after"] = answer.headers["x-next"]
        more = "x-incomplete" in answer.headers


@pytest.mark.usefixtures("worker")
def test_following_a_batch(client: TestClient, database: Database) -> None:
    batch_id = submit(client, 7)
    follow = pages(client, batch_id, order="completion", limit=3)
    assert next(follow) == []
    seen = end(database, 2)
    first = [client.get(f"/v1/jobs/{job_id}").json()["custom_id"] for job_id in seen]
    assert sorted(next(follow)) == sorted(first)
    assert next(follow) == []
    end(database, 1, "failed")
    end(database, 4)
    rest = [next(follow), next(follow)]
    assert [len(page) for page in rest] == [3, 2]
    assert sorted(first + rest[0] + rest[1]) == [str(i) for i in range(7)]
    assert list(follow) == [], "the last page said so"


@pytest.mark.usefixtures("worker")
def test_pages_in_input_order(client: TestClient, database: Database) -> None:
    batch_id = submit(client, 5)
    end(database, 5)
    expected = [["0", "1"], ["2", "3"], ["4"]]
    assert list(pages(client, batch_id, limit=2)) == expected
    assert list(pages(client, batch_id, order="input", limit=2)) == expected
    assert list(pages(client, batch_id, after=2)) == [["3", "4"]]
    whole = client.get(f"/v1/batches/{batch_id}/results", params={"order": "input"})
    assert [line["custom_id"] for line in lines(whole)] == ["0", "1", "2", "3", "4"]
    assert "x-next" not in whole.headers
    assert "x-incomplete" not in whole.headers


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("order=random", "order"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("after=-2", "after"),
        ("after=99999999999", "after"),
        ("after=7&order=completion", "after"),
        ("limit=1&limit=2", "limit"),
        ("cursor=1", "cursor"),
    ],
)
def test_bad_queries_are_named(front: TestClient, query: str, param: str) -> None:
    answer = front.get(f"/v1/batches/{submit(front, 1)}/results?{query}")
    assert error_of(answer, 400)["param"] == param


@pytest.mark.usefixtures("worker")
def test_retry_of_a_batch_and_of_a_job(client: TestClient, database: Database, woken: list[str]) -> None:
    batch_id = submit(client, 4)
    end(database, 1)
    failed = end(database, 2, "failed")
    open_job = client.get("/v1/jobs", params={"status": "queued"}).json()["data"][0]["id"]
    woken.clear()
    answer = client.post(f"/v1/batches/{batch_id}/retry", headers={"Idempotency-Key": "k"})
    assert answer.status_code == 202
    batch = answer.json()
    assert answer.headers["location"] == f"/v1/batches/{batch['id']}"
    assert (batch["retry_of"], batch["request_counts"]["total"]) == (batch_id, 2)
    assert batch["unserved_models"] == [], "as of any other submit: it is open, and a worker is there"
    assert woken == ["tiny"]
    again = client.post(f"/v1/batches/{batch_id}/retry", headers={"Idempotency-Key": "k"}, json={})
    assert again.json()["id"] == batch["id"]
    assert woken == ["tiny"]
    other = client.post(
        f"/v1/batches/{batch_id}/retry", headers={"Idempotency-Key": "k"}, json={"states": ["cancelled"]}
    )
    assert other.status_code == 422
    jobs = client.get("/v1/jobs", params={"batch_id": batch["id"]}).json()["data"]
    assert sorted(job["retry_of"] for job in jobs) == sorted(failed)
    one = client.post(f"/v1/jobs/{failed[0]}/retry", json={"states": ["failed"]})
    assert one.status_code == 202
    assert one.headers["location"] == f"/v1/jobs/{one.json()['id']}"
    assert (one.json()["retry_of"], one.json()["batch_id"]) == (failed[0], None)
    assert one.json()["unserved_models"] == []
    nothing = client.post(f"/v1/jobs/{open_job}/retry")
    assert error_of(nothing, 409)["code"] == "nothing_to_retry"
    assert nothing.headers["x-should-retry"] == "false"
    none = client.post(f"/v1/batches/{batch_id}/retry", json={"states": ["expired"]})
    assert (none.status_code, none.headers["x-should-retry"]) == (409, "false")
    assert client.get(f"/v1/batches/{batch_id}").json()["retry_of"] is None


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("noun", ["jobs", "batches"])
def test_retries_that_are_refused(client: TestClient, database: Database, noun: str) -> None:
    theirs = bearer(key_of(database, "other"))
    client.headers.update(bearer(key_of(database, "default")))
    batch_id = submit(client, 1)
    (job_id,) = end(database, 1, "failed")
    url = f"/v1/{noun}/{job_id if noun == 'jobs' else batch_id}/retry"
    for body, param in (({"state": ["failed"]}, "state"), ({"states": ["completed"]}, "states")):
        answer = client.post(url, json=body)
        assert error_of(answer, 400)["param"] == param
    assert client.post(url, content="[]").status_code == 400
    assert client.post(f"{url}?states=failed").status_code == 400
    assert client.post(f"/v1/{noun}/x_unknown/retry").status_code == 404
    assert client.post(f"/v1/{noun}/{'x' * 300}/retry").status_code == 404
    assert client.post(url, headers=theirs).status_code == 404
    results = f"/v1/batches/{batch_id}/results"
    for order in ("input", "completion"):
        foreign = client.get(results, params={"order": order}, headers=theirs)
        assert foreign.status_code == 404
    assert len(client.get("/v1/jobs").json()["data"]) == 1
