"""Revokes: what is revoked through Celery is cancelled in SQL, and who waits for it hears so."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
from celery import Celery
from celery.result import AsyncResult

from jobs.body import JobBody
from jobs.celery_results import CeleryResults
from jobs.claims import claim
from jobs.database import Database
from jobs.intake import Intake, TaskMessage
from jobs.revokes import Revokes
from jobs.settings import Settings
from jobs.tenants import DEFAULT
from tests.support import rows
from tests.support.waiting import wait_until

BODY = JobBody(prompt="a", model="tiny")


@pytest.fixture
def results(app: Celery) -> Iterator[CeleryResults]:
    results = CeleryResults(app)
    results.start()
    yield results
    results.stop(10.0)


def test_what_waits_is_over_and_what_runs_is_told_to_stop(
    database: Database, settings: Settings, app: Celery, results: CeleryResults
) -> None:
    intake = Intake(database, settings)
    intake.accept_messages([TaskMessage(name, BODY, DEFAULT) for name in ("runs", "stays")])
    database.transact(partial(claim, worker_id="w", model="tiny", limit=2))
    intake.accept_messages([TaskMessage("waits", BODY, DEFAULT)])
    pokes: list[bool] = []
    revokes = Revokes(database, results, on_cancelling=lambda: pokes.append(True))
    revokes.start()
    revokes.put(["waits", "stays", "nobody's"], running=False)
    revokes.put(["runs"], running=True)
    revokes.stop(10.0)
    assert not revokes.is_alive()
    expected = {"cancelled": ["waits"], "cancelling": ["runs"], "in_progress": ["stays"]}
    assert rows.jobs_by_state(database) == expected
    assert pokes == [True]
    wait_until(lambda: AsyncResult("waits", app=app).state == "REVOKED", "its sender hears of it")
    assert AsyncResult("runs", app=app).state == "PENDING", "until its worker has let go of it"


def test_one_that_fails_costs_no_other(
    database: Database, settings: Settings, results: CeleryResults, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of its own command nor of a later one."""
    messages = [TaskMessage(name, BODY, DEFAULT) for name in ("beside", "later")]
    Intake(database, settings).accept_messages(messages)
    revokes = Revokes(database, results, on_cancelling=lambda: None)
    revokes.start()
    revokes.put([{}, "beside"], running=True)  # type: ignore[list-item]
    revokes.put(["later"], running=False)
    revokes.stop(10.0)
    assert rows.jobs_by_state(database) == {"cancelled": ["beside", "later"]}
    assert "revokes.failed" in caplog.text
