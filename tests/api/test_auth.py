"""The gate: nobody without a key, nobody beyond a key's scopes, and no tenant sees another."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from api import known_keys
from api.app import create_app
from api.auth import Gate, caller_of, needed_scope
from api.known_keys import KnownKeys
from jobs.database import Database
from jobs.dialects import now
from jobs.key_text import KeyText, _checksum, new_key
from jobs.keys import Keys, Scope
from jobs.models import Key
from jobs.settings import Settings
from tests.api.test_job_routes import error_of, take
from tests.support.clients import bearer, key_of, local_client
from tests.support.waiting import wait_until

PUBLIC = {("GET", "/health"), ("GET", "/ready")}
NEEDED = {
    ("POST", "/v1/jobs"): Scope.SUBMIT,
    ("GET", "/v1/jobs"): Scope.READ,
    ("GET", "/v1/jobs/{job_id}"): Scope.READ,
    ("POST", "/v1/jobs/{job_id}/cancel"): Scope.SUBMIT,
    ("POST", "/v1/batches"): Scope.SUBMIT,
    ("GET", "/v1/batches"): Scope.READ,
    ("GET", "/v1/batches/{batch_id}"): Scope.READ,
    ("GET", "/v1/batches/{batch_id}/results"): Scope.READ,
    ("POST", "/v1/batches/{batch_id}/cancel"): Scope.SUBMIT,
    ("POST", "/v1/chat/completions"): Scope.SUBMIT,
    ("POST", "/v1/completions"): Scope.SUBMIT,
    ("POST", "/v1/responses"): Scope.SUBMIT,
    ("GET", "/v1/responses/{response_id}"): Scope.READ,
    ("POST", "/v1/responses/{response_id}/cancel"): Scope.SUBMIT,
    ("GET", "/v1/models"): Scope.READ,
    ("GET", "/v1/models/{model_id:path}"): Scope.READ,
    ("POST", "/v1/schedules"): Scope.SUBMIT,
    ("GET", "/v1/schedules"): Scope.READ,
    ("GET", "/v1/schedules/{schedule_id}"): Scope.READ,
    ("PATCH", "/v1/schedules/{schedule_id}"): Scope.SUBMIT,
    ("DELETE", "/v1/schedules/{schedule_id}"): Scope.SUBMIT,
    ("POST", "/v1/schedules/{schedule_id}/run"): Scope.SUBMIT,
    ("GET", "/v1/schedules/{schedule_id}/runs"): Scope.READ,
    ("POST", "/v1/jobs/{job_id}/retry"): Scope.SUBMIT,
    ("POST", "/v1/batches/{batch_id}/retry"): Scope.SUBMIT,
    ("GET", "/v1/usage"): Scope.READ,
    ("GET", "/metrics"): Scope.READ,
    ("POST", "/v1/files"): Scope.SUBMIT,
    ("GET", "/v1/files"): Scope.READ,
    ("GET", "/v1/files/{file_id}"): Scope.READ,
    ("GET", "/v1/files/{file_id}/content"): Scope.READ,
    ("DELETE", "/v1/files/{file_id}"): Scope.SUBMIT,
    ("GET", "/openapi.json"): Scope.READ,
}
ODD_PATHS = ["/", "/v1", "/nope", "/health/", "//health", "/HEALTH", "/health;x", "/health%0a", "/health%00"]
ODD_PATHS += ["/ready/x", "/v1/jobs/..%2f..%2fhealth", "/health%2f..%2fv1%2fjobs", "/docs", "/v1/admin/keys"]


@pytest.fixture
def app(database: Database, settings: Settings) -> FastAPI:
    return create_app(settings, database)


@pytest.fixture
def stranger(app: FastAPI) -> Iterator[TestClient]:
    """Somebody from elsewhere, under a name that is not this machine's."""
    with TestClient(app, base_url="http://press.example", raise_server_exceptions=False) as client:
        yield client


def routes(app: FastAPI) -> set[tuple[str, str]]:
    """Every registered (method, path); HEAD goes with GET."""
    found = set()
    waiting = list(app.router.routes)
    while waiting:
        route: Any = waiting.pop()
        if hasattr(route, "methods"):
            found |= {(method, route.path) for method in route.methods if method != "HEAD"}
        else:
            waiting += route.original_router.routes
    return found


def filled(path: str) -> str:
    """A path of a route with ids that nobody has."""
    return re.sub(r"{(\w+)_id[^}]*}", r"\1_1", path)


def test_every_route_is_accounted_for(app: FastAPI) -> None:
    assert routes(app) == PUBLIC | set(NEEDED)
    assert {route: needed_scope(*route) for route in NEEDED} == NEEDED
    assert needed_scope("DELETE", "/v1/jobs/job_1") is Scope.SUBMIT
    assert needed_scope("PUT", "/v1/jobs/job_1") is Scope.ADMIN
    assert needed_scope("DELETE", "/v1/admin/keys") is Scope.ADMIN
    assert needed_scope("GET", "/v1/admin/keys") is Scope.ADMIN
    assert needed_scope("OPTIONS", "/v1/jobs") is Scope.ADMIN


def test_without_a_key_every_route_is_closed(app: FastAPI, database: Database, stranger: TestClient) -> None:
    key = key_of(database, "default")
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND")
    paths = {filled(path) for _, path in routes(app)}
    with local_client(app) as here:
        for client in (stranger, here):
            for path in sorted(paths - {"/health", "/ready"}) + ODD_PATHS:
                for method in methods if client is stranger else ("GET", "POST"):
                    answer = client.request(method, path)
                    assert answer.status_code == 401, f"{method} {path}"
                    assert answer.headers["x-should-retry"] == "false"
                    assert answer.headers["www-authenticate"] == "Bearer"
                    if method != "HEAD":
                        assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert client.get("/health").status_code == 200
            assert client.get("/ready").status_code == 200
    assert stranger.get("/v1/jobs", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/jobs", "/health"])
def test_what_is_not_http_is_closed(database: Database, path: str) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> None:
        raise AssertionError("the gate let it in")

    scope = {"type": "websocket", "path": path, "headers": [], "client": ("127.0.0.1", 1)}
    asyncio.run(Gate(never, Keys(database))(scope, never, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_key_opens_only_what_its_scopes_say(database: Database, stranger: TestClient) -> None:
    for scope in Scope:
        headers = bearer(key_of(database, "default", scope))
        for (method, path), needed in NEEDED.items():
            path = filled(path)
            answer = stranger.request(method, path, headers=headers)
            if scope in (needed, Scope.ADMIN):
                assert answer.status_code in (200, 404, 415), f"{scope} {method} {path}"
            else:
                error = error_of(answer, 403)
                assert error["code"] == "insufficient_permissions"
                assert f"scope {needed}" in error["message"]
        answer = stranger.put("/v1/jobs/job_1", headers=headers)
        assert answer.status_code == (405 if scope is Scope.ADMIN else 403)


def test_keys_that_are_none(database: Database, stranger: TestClient, caplog: Any) -> None:
    key = key_of(database, "default")
    forged = key[:16] + new_key().text[16:59]  # the public part of a real key, another secret
    forged += _checksum(forged)
    bad: list[tuple[Any, str]] = [
        ({}, "is required"),
        ({"Authorization": ""}, "must be sent once"),
        ({"Authorization": key}, "must be sent once"),
        ({"Authorization": f"Basic {key}"}, "must be sent once"),
        ({"Authorization": "Bearer"}, "is not an API key"),
        ({"Authorization": "Bearer sk-abc"}, "is not an API key"),
        ({"Authorization": f"Bearer {key} x"}, "is not an API key"),
        ({"Authorization": f"Bearer {key[:-1]}"}, "is not an API key"),
        ({"Authorization": f"Bearer {key[:30]}{'a' if key[30] != 'a' else 'b'}{key[31:]}"}, "checksum"),
        ([("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")], "must be sent once"),
        (bearer(new_key().text), "is not valid"),
        (bearer(forged), "is not valid"),
        ({"x-api-key": key}, "is required"),
        ({"Authorization": b"Bearer \xff\xfe"}, "is not an API key"),
    ]
    with caplog.at_level(logging.DEBUG):
        for headers, words in bad:
            error = error_of(stranger.get("/v1/jobs", headers=headers), 401)
            assert (error["code"], error["param"]) == ("invalid_api_key", None)
            assert words in error["message"], headers
            assert key not in error["message"]
        assert stranger.get(f"/v1/jobs?api_key={key}").status_code == 401
        for spelling in ("Bearer", "bearer", "BEARER"):
            headers = {"Authorization": f"{spelling} {key}"}
            assert stranger.get("/v1/jobs", headers=headers).status_code == 200
    logged = [one.getMessage() for one in caplog.records if not one.name.startswith("httpx")]  # ours
    for secret in (key, key[16:], forged, forged[16:]):
        assert not [line for line in logged if secret in line]


def test_a_key_that_does_not_exist_is_compared_all_the_same(
    database: Database, stranger: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(database, "default")
    compared: list[bool] = []
    real = KeyText.has_hash

    def has_hash(self: KeyText, stored: str) -> bool:
        compared.append(real(self, stored))
        return compared[-1]

    monkeypatch.setattr(KeyText, "has_hash", has_hash)
    assert stranger.get("/v1/jobs", headers=bearer(key)).status_code == 200
    assert stranger.get("/v1/jobs", headers=bearer(new_key().text)).status_code == 401
    assert compared == [True, False]


def test_a_dead_key_says_so_to_its_holder(
    database: Database, stranger: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(database)
    key = key_of(database, "default")
    monkeypatch.setattr(known_keys, "CACHE_SECONDS", 3600.0)
    rotated = key_of(database, "default")
    short = key_of(database, "default", life=0.4)

    def id_of(text: str) -> str:
        return f"key_{text[3:15]}"

    def code(text: str) -> int:
        return stranger.get("/v1/jobs", headers=bearer(text)).status_code

    # An end that was known when the key was looked up is kept to the moment, in spite of what is remembered.
    wait_until(lambda: code(short) == 401, "the short key ends", 30)
    error = error_of(stranger.get("/v1/jobs", headers=bearer(short)), 401)
    assert "expired" in error["message"]
    monkeypatch.setattr(known_keys, "CACHE_SECONDS", 0.2)
    assert [code(text) for text in (key, rotated)] == [200, 200]
    _, successor, _ = keys.rotate(id_of(rotated), overlap=0.0)
    keys.revoke(id_of(key))
    wait_until(lambda: code(key) == code(rotated) == 401, "both ends are heard of", 30)
    assert "revoked" in error_of(stranger.get("/v1/jobs", headers=bearer(key)), 401)["message"]
    assert code(successor.text) == 200


def test_a_use_is_written_down(database: Database, stranger: TestClient) -> None:
    key = key_of(database, "default")
    for _ in range(2):
        stranger.get("/v1/jobs", headers=bearer(key))
    with database.write() as connection:
        assert connection.scalars(select(Key.last_used_at > now() - 60)).one()
        connection.execute(update(Key).values(last_used_at=1.0))
    stranger.get("/v1/jobs", headers=bearer(key))
    with database.read() as connection:
        assert connection.scalars(select(Key.last_used_at)).one() == 1.0, "once a minute is enough"


def test_only_so_many_keys_are_remembered(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_keys, "CACHE_KEYS", 2)
    made = [f"key_{key_of(database, 'default')[3:15]}" for _ in range(4)]
    known = KnownKeys(Keys(database))

    async def look() -> None:
        for key_id in [*made, "key_unknown", made[3]]:
            found = await known.find(key_id)
            assert (found is None) == (key_id == "key_unknown")
            await known.note_use(key_id)

    asyncio.run(look())
    assert set(known._found) == set(made[2:])
    assert len(known._noted) <= 3


def test_the_first_key_closes_the_door(
    app: FastAPI, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_keys, "CACHE_SECONDS", 0.1)
    with local_client(app) as client:
        job_id = client.post("/v1/jobs", json={"prompt": "a"}).json()["id"]
        key = key_of(database, "default", Scope.READ)
        wait_until(lambda: client.get("/v1/jobs").status_code == 401, "the door closes", 30)
        Keys(database).revoke(f"key_{key[3:15]}")
        wait_until(
            lambda: client.get("/v1/jobs", headers=bearer(key)).status_code == 401, "the only key dies", 30
        )
        assert client.get("/v1/jobs").status_code == 401, "closed it stays"
        key = key_of(database, "default", Scope.READ)
        assert client.get(f"/v1/jobs/{job_id}", headers=bearer(key)).json()["status"] == "queued"


def test_without_keys_only_this_machine_is_answered(app: FastAPI) -> None:
    for host in ("192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "testclient"):
        with TestClient(app, base_url="http://127.0.0.1", client=(host, 1)) as client:
            for path in ("/health", "/ready", "/v1/jobs", "/nope"):
                assert error_of(client.get(path), 401)["code"] == "invalid_api_key"
    for name in ("press.example", "127.0.0.1.example", "192.0.2.1"):
        with TestClient(app, base_url=f"http://{name}", client=("127.0.0.1", 1)) as client:
            for path in ("/health", "/ready", "/v1/jobs", "/nope"):
                assert error_of(client.get(path), 421)["param"] == "host"
    with TestClient(app, base_url="http://localhost", client=("::1", 1)) as client:
        assert client.get("/v1/jobs").status_code == 200


def test_tenants_never_see_each_other(app: FastAPI, database: Database, stranger: TestClient) -> None:
    mine, theirs = bearer(key_of(database, "default", Scope.ADMIN)), bearer(key_of(database, "other"))

    def submit(headers: dict[str, str]) -> dict[str, str]:
        jobs = {"jobs": [{"prompt": "a", "custom_id": "same"}] * 3}
        batch_id = stranger.post("/v1/jobs", json=jobs, headers=headers).json()["id"]
        job_id = stranger.post("/v1/jobs", json={"prompt": "b"}, headers=headers).json()["id"]
        response_id = "resp_" + job_id.removeprefix("job_")
        schedule = {"name": "same", "cron": "0 2 * * *", "jobs": [{"prompt": "c"}]}
        answer = stranger.post("/v1/schedules", json=schedule, headers=headers)
        form: Any = {"data": {"purpose": "batch"}, "files": {"file": ("same.jsonl", b"{}")}}
        file_id = stranger.post("/v1/files", headers=headers, **form).json()["id"]
        return {
            "{batch_id}": batch_id,
            "{job_id}": job_id,
            "{file_id}": file_id,
            "{response_id}": response_id,
            "{schedule_id}": answer.json()["id"],
        }

    ours, others = submit(mine), submit(theirs)
    assert len(take(database)) == 8
    paths = {route for route in NEEDED if "_id}" in route[1]}
    assert len(paths) == 17
    for headers, own, foreign in ((mine, ours, others), (theirs, others, ours)):
        for method, path in paths:
            noun = next(noun for noun in foreign if noun in path)
            nobodys = "resp_no_such" if noun == "{response_id}" else "no_such"
            options: Any = {"headers": headers} | ({"json": {"enabled": False}} if method == "PATCH" else {})
            refused = stranger.request(method, path.replace(noun, foreign[noun]), **options)
            unknown = stranger.request(method, path.replace(noun, nobodys), **options)
            assert refused.status_code == unknown.status_code == 404, f"{method} {path}"
            assert (
                refused.json()["error"]["message"].replace(foreign[noun], nobodys)
                == (unknown.json()["error"]["message"])
            )
            assert refused.json()["error"]["code"] == unknown.json()["error"]["code"]
        answer = stranger.get("/v1/jobs", params={"after": foreign["{job_id}"]}, headers=headers)
        assert error_of(answer, 400)["param"] == "after"
        answer = stranger.get("/v1/jobs", params={"batch_id": foreign["{batch_id}"]}, headers=headers)
        assert answer.json()["data"] == []
        for noun, kind in (("{file_id}", "files"), ("{batch_id}", "batches")):
            listed = stranger.get(f"/v1/{kind}", headers=headers).json()["data"]
            assert [one["id"] for one in listed] == [own[noun]]
            answer = stranger.get(f"/v1/{kind}", params={"after": foreign[noun]}, headers=headers)
            assert error_of(answer, 400)["param"] == "after"
        wish = {
            "input_file_id": foreign["{file_id}"],
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        assert (
            error_of(stranger.post("/v1/batches", json=wish, headers=headers), 404)["param"]
            == "input_file_id"
        )
        listed = stranger.get("/v1/jobs", params={"limit": 100}, headers=headers).json()["data"]
        assert len(listed) == 4
        assert {job["batch_id"] for job in listed} == {own["{batch_id}"], None}
        same = stranger.get("/v1/jobs", params={"custom_id": "same"}, headers=headers).json()["data"]
        assert {job["batch_id"] for job in same} == {own["{batch_id}"]}
        (listed,) = stranger.get("/v1/schedules", headers=headers).json()["data"]
        assert (listed["id"], listed["enabled"]) == (own["{schedule_id}"], True)
        answer = stranger.get("/v1/schedules", params={"after": foreign["{schedule_id}"]}, headers=headers)
        assert error_of(answer, 400)["param"] == "after"
    for headers, own in ((mine, ours), (theirs, others)):
        found = stranger.get(f"/v1/jobs/{own['{job_id}']}", headers=headers).json()
        assert found["status"] == "in_progress", "the others' cancels reached nothing"
        batch = stranger.get(f"/v1/batches/{own['{batch_id}']}", headers=headers).json()
        assert (batch["status"], batch["job_counts"]["in_progress"]) == ("in_progress", 3)


def test_a_tenant_is_no_field_of_a_body(database: Database, stranger: TestClient) -> None:
    headers = bearer(key_of(database, "other"))
    answer = stranger.post("/v1/jobs", json={"prompt": "a", "tenant": "default"}, headers=headers)
    assert error_of(answer, 400)["param"] == "tenant"


def test_the_schema_says_how_to_authenticate(database: Database, stranger: TestClient) -> None:
    headers = bearer(key_of(database, "default"))
    schema = stranger.get("/openapi.json", headers=headers).json()
    assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert ("security" in operation) == ((method.upper(), path) not in PUBLIC)


def test_a_database_that_is_gone_is_said_at_the_gate() -> None:
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    with local_client(create_app(Settings(model="tiny"), database)) as client:
        answer = client.get("/v1/jobs", headers=bearer(new_key().text))
        assert error_of(answer, 503)["code"] == "database_unreachable"
        assert answer.headers["retry-after"]
    database.close()


def test_a_handler_without_a_gate_has_no_caller() -> None:
    with pytest.raises(KeyError):
        asyncio.run(caller_of(Request({"type": "http", "state": {}})))
