"""Usage over HTTP: whose, how it is grouped, what it costs, and what is refused."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from jobs.database import Database
from jobs.keys import Scope
from jobs.models import LedgerEntry
from jobs.prices import Prices
from tests.api.test_job_routes import error_of
from tests.api.test_results import end, worker  # noqa: F401 - a worker that can claim
from tests.support.clients import bearer, key_of


def usage(client: TestClient, *, by: str | None = None, headers: Any = None, **params: Any) -> list[Any]:
    params |= {} if by is None else {"group_by": by}
    answer = client.get("/v1/usage", params=params, headers=headers)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


@pytest.mark.usefixtures("worker")
def test_one_tenant(client: TestClient, database: Database) -> None:
    assert usage(client)[0]["jobs"] == 0
    assert usage(client, by="day") == []
    for i in range(6):
        client.post("/v1/jobs", json={"prompt": "a", "custom_id": str(i)})
    end(database, 4)
    end(database, 2, "failed")
    (row,) = usage(client)
    assert (row["jobs"], row["cost"], row["currency"], row["day"]) == (4, None, None, None)
    assert row["billed"] == {
        "attempts": 4,
        "prompt_tokens": 12,
        "cached_tokens": 0,
        "completion_tokens": 20,
        "total_tokens": 32,
    }
    assert row["wasted"]["total_tokens"] == 16
    assert row["cancelled"]["attempts"] == 0
    (day,) = usage(client, by="day,model")
    assert day["model"] == "tiny"
    today = datetime.datetime.now(datetime.UTC).date()
    assert datetime.date.fromisoformat(day["day"]) in (today, today - datetime.timedelta(days=1))
    assert day["billed"] == row["billed"]


@pytest.mark.usefixtures("worker")
def test_costs(client: TestClient, database: Database) -> None:
    Prices(database).set("tiny", prompt="0.1", completion="0.000001", currency="EUR", valid_from=1.0)
    assert (usage(client)[0]["cost"], usage(client)[0]["currency"]) == ("0", "EUR")
    for model in ("tiny", "tiny"):
        client.post("/v1/jobs", json={"prompt": "a", "model": model})
    end(database, 2)
    (row,) = usage(client)
    assert row["cost"] == "0.00000060001"  # 6 x 0.1 + 10 x 0.000001, over a million
    assert Decimal(row["cost"]) == (6 * Decimal("0.1") + 10 * Decimal("0.000001")) / 1_000_000


@pytest.mark.usefixtures("worker")
def test_times_and_pages(client: TestClient, database: Database) -> None:
    for _ in range(3):
        client.post("/v1/jobs", json={"prompt": "a"})
    for index, job_id in enumerate(end(database, 3)):
        with database.write() as connection:
            moment = 86_400.0 * (20_000 + index)  # 2024-10-04 and the two days after
            connection.execute(
                update(LedgerEntry).where(LedgerEntry.job_id == job_id).values(created_at=moment)
            )
    assert [row["day"] for row in usage(client, by="day")] == ["2024-10-04", "2024-10-05", "2024-10-06"]
    two = usage(client, by="day", start="2024-10-05", end="2024-10-07")
    assert [row["day"] for row in two] == ["2024-10-05", "2024-10-06"]
    assert usage(client, start=86_400 * 20_001, end=86_400 * 20_001 + 0.5)[0]["jobs"] == 1
    days = []
    after: dict[str, str] = {}
    for _ in range(3):
        page = client.get("/v1/usage", params={"group_by": "day", "limit": 1, **after}).json()
        days += [row["day"] for row in page["data"]]
        assert page["has_more"] is (page["next"] is not None) is (len(days) < 3)
        after = {"after": page["next"]}
    assert days == ["2024-10-04", "2024-10-05", "2024-10-06"]


@pytest.mark.usefixtures("worker")
def test_who_may_ask_about_whom(client: TestClient, database: Database) -> None:
    mine, other = (bearer(key_of(database, tenant)) for tenant in ("default", "other"))
    admin = bearer(key_of(database, "default", Scope.ADMIN))
    for headers in (mine, other, other):
        client.post("/v1/jobs", json={"prompt": "a"}, headers=headers)
    end(database, 3)
    assert usage(client, headers=mine)[0]["jobs"] == 1
    assert usage(client, headers=mine, tenant="default")[0]["jobs"] == 1
    assert usage(client, headers=other, by="tenant")[0]["tenant"] == "other"
    for tenant in ("default", "*", "nobody"):
        answer = client.get("/v1/usage", params={"tenant": tenant}, headers=other)
        assert error_of(answer, 403)["code"] == "insufficient_permissions"
    assert usage(client, headers=admin)[0]["jobs"] == 1
    assert usage(client, headers=admin, tenant="other")[0]["jobs"] == 2
    rows = usage(client, headers=admin, tenant="*", by="tenant,key")
    assert [(row["tenant"], row["jobs"]) for row in rows] == [("default", 1), ("other", 2)]
    assert all(row["key_id"].startswith("key_") for row in rows)
    assert client.get("/v1/usage?tenant=nobody", headers=admin).status_code == 404
    submit_only = bearer(key_of(database, "other", Scope.SUBMIT))
    assert client.get("/v1/usage", headers=submit_only).status_code == 403


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("group_by=hour", "group_by"),
        ("group_by=day,day", "group_by"),
        ("group_by=day&group_by=day", "group_by"),
        ("group_by=", "group_by"),
        ("start=yesterday", "start"),
        ("start=2024-13-01", "start"),
        ("start=-5", "start"),
        ("start=nan", "start"),
        ("start=5&end=5", "end"),
        ("end=1e9", "end"),
        ("limit=0", "limit"),
        ("limit=1&limit=2", "limit"),
        ("after=x", "after"),
        ("tenant=A%20b", "tenant"),
        ("tenant=%00", "tenant"),
        ("since=1", "since"),
    ],
)
def test_bad_queries_are_named(front: TestClient, query: str, param: str) -> None:
    answer = front.get(f"/v1/usage?{query}")
    assert error_of(answer, 400)["param"] == param
