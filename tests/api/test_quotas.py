"""A quota that is used up, as a client of the HTTP API sees it."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI, RateLimitError

from jobs import tallies
from jobs.database import Database
from jobs.tenants import Tenants
from tests.api.test_job_routes import error_of

JOB = {"prompt": "a" * 40, "max_tokens": 90}


@pytest.mark.parametrize(
    ("quotas", "retry_after", "should_retry"),
    [
        ({"queued_jobs": 1}, "30", None),
        ({"queued_tokens": 150}, "30", None),
        ({"queued_tokens": 50}, None, "false"),
        ({"stored_bytes": 10}, None, "false"),
        ({"tokens_per_day": 0}, None, "false"),
    ],
)
def test_a_submit_that_does_not_fit(
    client: TestClient,
    database: Database,
    quotas: dict[str, int],
    retry_after: str | None,
    should_retry: str | None,
) -> None:
    assert client.post("/v1/jobs", json=JOB).status_code == 202
    Tenants(database).change("default", quotas=quotas)
    for body in (JOB, {"jobs": [JOB]}):
        answer = client.post("/v1/jobs", json=body)
        error = error_of(answer, 429)
        (name,) = quotas
        assert (error["code"], error["param"]) == ("quota_exceeded", None)
        assert error["message"].startswith(f"{name}: at most {quotas[name]} ")
        assert answer.headers.get("retry-after") == retry_after
        assert answer.headers.get("x-should-retry") == should_retry
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_openais_client_does_not_try_again_where_it_would_be_no_use(
    client: TestClient, database: Database
) -> None:
    Tenants(database).change("default", quotas={"stored_bytes": 10})
    calls: list[int] = []
    client.event_hooks = {"response": [lambda answer: calls.append(answer.status_code)]}
    openai = OpenAI(base_url="http://127.0.0.1/v1", api_key="unused", http_client=client, max_retries=5)
    with pytest.raises(RateLimitError) as caught:
        openai.post("/jobs", cast_to=object, body=JOB)
    assert caught.value.code == "quota_exceeded"
    assert calls == [429]


def test_a_day_that_is_used_up_says_when_it_ends(client: TestClient, database: Database) -> None:
    Tenants(database).change("default", quotas={"tokens_per_day": 5})
    assert client.post("/v1/jobs", json=JOB).status_code == 202
    with database.write() as connection:
        tallies.add(connection, [tallies.Change("default", billed=5)])
    answer = client.post("/v1/jobs", json=JOB)
    assert "tokens_per_day: at most 5 " in error_of(answer, 429)["message"]
    seconds = int(answer.headers["retry-after"])
    assert 0 < seconds <= 86_400
    assert answer.headers.get("x-should-retry") == ("false" if seconds > 60 else None)
