"""Arrivals: a Redis message is a row before it is acked; duplicates and nonsense are no accident."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult

from jobs.arrivals import Arrival, Arrivals
from jobs.broker import make_app
from jobs.celery_results import CeleryResults
from jobs.database import Database
from jobs.settings import Settings
from jobs.tenants import Tenants
from tests.support import rows
from tests.support.databases import let_write
from tests.support.waiting import wait_until


def plain_arrivals(database: Database, app: Celery, results: CeleryResults | None = None) -> Arrivals:
    """Of messages that nobody has revoked and nobody waits for."""
    return Arrivals(
        database,
        app.settings,
        results or CeleryResults(app),
        on_jobs=set[str]().update,
        is_revoked=lambda _: False,
        cancel=print,
    )


def test_messages_become_rows_and_then_are_committed(database: Database, app: Celery) -> None:
    results = CeleryResults(app)
    results.start()
    models: set[str] = set()
    cancelled: list[str] = []
    arrivals = Arrivals(
        database,
        app.settings,
        results,
        on_jobs=models.update,
        is_revoked=lambda task_id: task_id == "b",
        cancel=cancelled.append,
    )
    Tenants(database).create("blog", quotas={"queued_jobs": 1})
    arrivals.start()
    committed: list[str] = []

    def put(task_id: str, args: list[object], **kwargs: object) -> None:
        arrivals.put(Arrival(task_id, args, kwargs, lambda: committed.append(task_id)))

    put("a", [], prompt="hello")
    put("a", [], prompt="hello again")
    hushed = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"thinking": False}}
    put("b", [], **hushed)
    put("c", [], prompt="x", temperature=99)
    put("d", ["positional"], prompt="x")
    put("e", [], prompt="x", model="another", tenant=None)
    put("\x00", [], prompt="x")
    put("f", [], prompt="x", tenant="blog")
    put("g", [], prompt="x", tenant="blog")
    put("h", [], prompt="x", tenant="nobody")
    put("i", [], prompt="x", tenant="NO NAME")
    wait_until(lambda: len(committed) == 11, "all messages are dealt with")
    arrivals.stop(10.0)
    results.stop(10.0)
    assert rows.jobs_by_state(database) == {
        "queued": ["a", "b", "e", "f"],
        "failed": ["c", "d", "g", "h", "i"],
    }
    assert rows.job(database, "a").body["prompt"] == "hello"
    assert (rows.job(database, "a").tenant, rows.job(database, "a").key_id) == ("default", None)
    assert rows.job(database, "b").body == hushed | {"model": "tiny"}
    assert rows.job(database, "f").tenant == "blog"
    assert rows.job(database, "f").body == {"prompt": "x", "model": "tiny"}
    errors = {name: rows.job(database, name).error["code"] for name in "ghi"}
    assert errors == {"g": "quota_exceeded", "h": "unknown_tenant", "i": "invalid_value"}
    assert [rows.job(database, name).tenant for name in "ghi"] == ["blog", "default", "default"]
    assert "queued_jobs" in str(AsyncResult("g", app=app).result)
    assert rows.job(database, "c").error["param"] == "temperature"
    assert models == {"tiny", "another"}
    assert cancelled == ["b"]
    assert AsyncResult("a", app=app).state == "STARTED"
    refused = AsyncResult("c", app=app)
    assert refused.state == "FAILURE"
    assert "temperature" in str(refused.result)


def test_a_message_that_the_database_refuses_harms_only_itself(database: Database, app: Celery) -> None:
    """A constraint stands for anything that a database will not take of one message."""
    refuse = "CREATE UNIQUE INDEX one_custom_id ON jobs (custom_id)"
    database.transact(lambda connection: connection.exec_driver_sql(refuse))
    results = CeleryResults(app)
    arrivals = plain_arrivals(database, app, results)
    committed: list[str] = []
    for task_id, custom_id in (("a", "same"), ("b", "same"), ("c", "other")):
        body = {"prompt": "x", "custom_id": custom_id}
        arrivals.put(Arrival(task_id, [], body, lambda task_id=task_id: committed.append(task_id)))
    results.start()
    arrivals.start()
    arrivals.stop(30.0)
    results.stop(10.0)
    assert committed == ["a", "b", "c"]
    assert rows.jobs_by_state(database) == {"queued": ["a", "c"], "failed": ["b"]}
    assert rows.job(database, "b").error["code"] == "unstorable_job"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_nonsense_that_comes_while_the_database_is_away_is_dealt_with_later(
    database_url: str, database: Database, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[Any] = []

    def impatient(work: Any, **_: Any) -> Any:
        tries.append(work)
        return Database.transact(database, work, patience=0.0)

    monkeypatch.setattr(database, "transact", impatient)
    let_write(database_url, False)
    arrivals = plain_arrivals(database, app)
    committed: list[str] = []
    arrivals.put(Arrival("bad", [], "no object", lambda: committed.append("bad")))  # type: ignore[arg-type]
    arrivals.put(Arrival("good", [], {"prompt": "x"}, lambda: committed.append("good")))
    arrivals.start()
    wait_until(lambda: tries, "it has been tried")
    let_write(database_url, True)
    wait_until(lambda: len(committed) == 2, "both are dealt with")
    arrivals.stop(10.0)
    assert rows.jobs_by_state(database) == {"queued": ["good"], "failed": ["bad"]}


def test_a_message_that_comes_again_too_late_changes_nothing(database: Database, app: Celery) -> None:
    """Its ack was lost, and its deadline has passed meanwhile: whoever waits is not told that it was refused."""
    results = CeleryResults(app)
    results.start()
    arrivals = plain_arrivals(database, app, results)
    arrivals.start()
    committed: list[str] = []

    def put(deadline: float) -> None:
        body = {"prompt": "x", "deadline": deadline}
        arrivals.put(Arrival("a", [], body, lambda: committed.append("a")))
        before = len(committed)
        wait_until(lambda: len(committed) > before, "the message is dealt with")

    put(time.time() + 3_600)
    put(time.time() - 1)
    arrivals.stop(10.0)
    results.stop(10.0)
    assert rows.jobs_by_state(database) == {"queued": ["a"]}
    assert AsyncResult("a", app=app).state == "STARTED"


@pytest.mark.parametrize("hours", [2, -2])
def test_moments_go_by_the_databases_clock_wherever_the_workers_may_stand(
    database: Database, app: Celery, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    true = time.time()
    monkeypatch.setattr(time, "time", lambda at=time.time: at() + 3_600 * hours)
    arrivals = plain_arrivals(database, app)
    for name, terms in (
        ("window", {"completion_window": "90m"}),
        ("deadline", {"deadline": true + 3_600}),
        ("later", {"not_before": true + 3_600}),
        ("past", {"deadline": true - 3_600}),
    ):
        arrivals.put(Arrival(name, [], {"prompt": "x"} | terms, lambda: None))
    arrivals.start()
    arrivals.stop(10.0)
    assert rows.jobs_by_state(database) == {"queued": ["deadline", "later", "window"], "failed": ["past"]}
    assert rows.job(database, "window").deadline == pytest.approx(true + 5_400, abs=60)
    assert rows.job(database, "deadline").deadline == true + 3_600
    assert rows.job(database, "later").not_before == true + 3_600


def test_a_name_in_a_message_forges_no_line_of_the_log(
    database: Database, app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    forged = "x\n2026-01-01 00:00:00 ERROR jobs.worker worker.lost\x1b[2J\u2028é" + "y" * 500
    arrivals = plain_arrivals(database, app)
    arrivals.put(Arrival("a", [], {"prompt": "x", forged: 1}, lambda: None))
    arrivals.start()
    arrivals.stop(10.0)
    (line,) = [message for message in caplog.messages if "arrivals.refused" in message]
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 150
    assert "unknown_parameter" in line
    assert rows.job(database, "a").error["code"] == "unknown_parameter"


def test_a_task_id_forges_no_line_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    away = make_app(Settings(data_dir=tmp_path, redis_url=f"unix://{tmp_path}/nobody"))
    results = CeleryResults(away)
    results.failed("a\nworker.lost" + "y" * 200, {"code": "invalid_value", "message": "no id"})
    results.start()
    results.stop(30.0)
    away.close()
    (line,) = [message for message in caplog.messages if "celery_results.failed" in message]
    assert line.startswith("celery_results.failed job='a\\nworker.lost")
    assert line.isprintable()
    assert len(line) < 150
