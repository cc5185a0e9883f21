"""/metrics of the API: counted by route and status, closed to strangers, and no two applications mix."""

from __future__ import annotations

from fastapi.testclient import TestClient

from api.app import create_app
from jobs.database import Database
from jobs.keys import Scope
from jobs.settings import Settings
from tests.api.test_job_routes import error_of
from tests.support.clients import bearer, key_of, local_client
from tests.support.scrape import samples_of, value_of


def test_requests_by_route(client: TestClient, database: Database, settings: Settings) -> None:
    job_id = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
    for _ in range(3):
        client.get(f"/v1/jobs/{job_id}")
    client.get("/v1/jobs/job_secret")
    client.get("/v1/nothing/secret")
    client.head("/v1/jobs/job_secret")
    client.request("SECRET", "/v1/jobs")
    client.post("/v1/jobs", json={"prompt": 3})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples_of(answer.text)
    name = "nightpress_http_requests_total"
    assert value_of(found, name, method="GET", route="/v1/jobs/{job_id}", status="200") == 3
    assert value_of(found, name, method="GET", route="/v1/jobs/{job_id}", status="404") == 1
    assert value_of(found, name, method="HEAD", route="/v1/jobs/{job_id}", status="404") == 1
    assert value_of(found, name, method="POST", route="/v1/jobs", status="202") == 1
    assert value_of(found, name, method="POST", route="/v1/jobs", status="400") == 1
    assert value_of(found, name, route="unrouted", status="404") == 1
    assert value_of(found, name, method="other") == 1
    assert value_of(found, "nightpress_http_request_seconds_count", route="/v1/jobs/{job_id}") == 5
    assert value_of(found, "nightpress_queue_depth", model="tiny", tier="normal") == 1
    assert "secret" not in answer.text.lower()
    assert job_id not in answer.text
    with local_client(create_app(settings, database)) as other:
        assert name not in dict(key for key in samples_of(other.get("/metrics").text))


def test_who_may_scrape(client: TestClient, database: Database) -> None:
    reader = bearer(key_of(database, "default", Scope.READ))
    submitter = bearer(key_of(database, "default", Scope.SUBMIT))
    assert client.get("/metrics", headers=submitter).status_code == 403
    assert client.get("/metrics", headers=reader).status_code == 200
    assert client.get("/metrics").status_code == 401
    assert error_of(client.get("/metrics?x=1", headers=reader), 400)["param"] == "x"
    found = samples_of(client.get("/metrics", headers=reader).text)
    refused = value_of(found, "nightpress_http_requests_total", route="unrouted", status="403")
    assert refused == 1, "what the gate refuses counts too"
