"""Ends of Redis jobs that nobody told Celery of: a real client that waits gets its answer from a worker's sweep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from sqlalchemy import select, text, update

from jobs.body import JobBody
from jobs.broker import make_app
from jobs.cancels import Cancels
from jobs.celery_results import CeleryResults
from jobs.claims import claim
from jobs.database import Database
from jobs.dialects import now
from jobs.intake import Intake, TaskMessage
from jobs.leases import register
from jobs.models import Job
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.states import JobState
from jobs.teller import Teller
from jobs.tenants import OPERATOR
from tests.support import rows
from tests.support.bare_celery import bare_celery, leave_backend
from tests.support.waiting import wait_until

OUTPUTS = [{"index": 0, "text": "out", "finish_reason": "stop", "stop_reason": None}]


@pytest.fixture
def results(redis_url: str, settings: Settings) -> Iterator[CeleryResults]:
    app = make_app(settings.model_copy(update={"redis_url": redis_url}))
    results = CeleryResults(app)
    results.start()
    yield results
    results.stop(10)
    leave_backend(app)
    app.close()


@pytest.fixture
def teller(database: Database, results: CeleryResults) -> Teller:
    teller = Teller(database, results)
    results.on_told = teller.told
    return teller


@pytest.fixture
def other_worker(redis_url: str, settings: Settings) -> Iterator[CeleryResults]:
    """Not started: a test stores with it when it likes."""
    app = make_app(settings.model_copy(update={"redis_url": redis_url}))
    yield CeleryResults(app)
    leave_backend(app)
    app.close()


def untold(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.scalars(select(Job.id).where(Job.told_at.is_(None))))


def later(database: Database) -> None:
    with database.write() as connection:
        connection.execute(update(Job).values(finished_at=Job.finished_at - 60))


def test_every_end_is_told_of(
    database: Database, settings: Settings, redis_url: str, results: CeleryResults, teller: Teller
) -> None:
    intake = Intake(database, settings)
    names = ("completed", "failed", "cancelled", "expired", "open")
    intake.accept_messages([TaskMessage(name, JobBody(prompt="x"), "default") for name in names])
    over_http = intake.accept_one(JobBody(prompt="x"), OPERATOR)
    Cancels(database).cancel_job("cancelled", tenant="default")
    Cancels(database).cancel_job(over_http, tenant="default")
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)
        connection.execute(update(Job).where(Job.id == "expired").values(state="expired", finished_at=now()))
        connection.execute(update(Job).where(Job.id == "open").values(tier=3))
        outcomes = [
            Outcome(
                job_id=one.job_id,
                fence=1,
                kind=one.job_id,  # type: ignore[arg-type]
                outputs=OUTPUTS,
                error={"code": "numerics", "message": "NaN"},
                prompt_tokens=3,
                completion_tokens=4,
            )
            for one in claim(connection, worker_id="w", model="tiny", limit=2)
        ]
        record(connection, worker_id="w", outcomes=outcomes)
    with bare_celery(redis_url) as app:
        teller.sweep()
        assert AsyncResult("cancelled", app=app).state == "PENDING", "whoever ended it tells first"
        later(database)
        teller.sweep()
        with pytest.raises(TaskRevokedError):
            AsyncResult("cancelled", app=app).get(timeout=20)
        with pytest.raises(Exception, match="deadline_exceeded: "):
            AsyncResult("expired", app=app).get(timeout=20)
        with pytest.raises(Exception, match="numerics: NaN"):
            AsyncResult("failed", app=app).get(timeout=20)
        answer = AsyncResult("completed", app=app).get(timeout=20)
        assert (answer["text"], answer["model"], answer["usage"]["total_tokens"]) == ("out", "tiny", 7)
        assert AsyncResult("open", app=app).state == "PENDING"
    wait_until(lambda: untold(database) == {"open", over_http}, "they are marked as told")
    assert rows.job(database, "open").state == JobState.QUEUED


def test_told_once(
    database: Database,
    settings: Settings,
    results: CeleryResults,
    teller: Teller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What could not be stored is told again; what was is not."""
    intake = Intake(database, settings)
    intake.accept_messages([TaskMessage("a", JobBody(prompt="x"), "default")])
    Cancels(database).cancel_job("a", tenant="default")
    later(database)
    tries: list[str] = []
    real = results.backend.mark_as_revoked

    def away(job_id: str, reason: str) -> None:
        tries.append(job_id)
        if len(tries) == 1:
            raise ConnectionError
        real(job_id, reason=reason)

    monkeypatch.setattr(results.backend, "mark_as_revoked", away)
    teller.sweep()
    wait_until(lambda: len(tries) == 1 and results.idle, "it was tried")
    assert untold(database) == {"a"}
    teller.sweep()
    wait_until(lambda: not untold(database), "it is told")
    teller.sweep()
    wait_until(lambda: results.idle, "nothing more comes")
    assert tries == ["a", "a"]


def test_an_idle_sweep_looks_into_an_index_that_is_empty(database: Database) -> None:
    if not database.is_sqlite:
        pytest.skip("PostgreSQL plans by statistics, which a small table has none of")
    with database.read() as connection:
        plan = connection.execute(
            text(
                "EXPLAIN QUERY PLAN SELECT id FROM jobs WHERE source = 'redis' AND told_at IS NULL "
                "AND finished_at IS NOT NULL AND finished_at < 5 ORDER BY finished_at, id LIMIT 200"
            )
        ).all()
    assert "ix_jobs_untold" in str(plan)


def test_an_end_told_by_another_worker_is_not_overwritten_by_a_late_beginning(
    results: CeleryResults, other_worker: CeleryResults, redis_url: str
) -> None:
    """One worker took the message in and says STARTED; another had the job at once, and its end is stored between the
    first one's look at Redis and its word."""
    encode, told = results.backend.encode, []

    def encode_late(meta: dict[str, object]) -> object:
        if not told:
            told.append(meta["status"])
            other_worker.backend.store_result("quick", {"text": "out"}, "SUCCESS")
        return encode(meta)

    results.backend.encode = encode_late
    results.started("quick")
    results.started("slow")
    wait_until(lambda: results.idle, "both are told")
    assert told == ["STARTED"]
    with bare_celery(redis_url) as client:
        assert AsyncResult("quick", app=client).get(timeout=10) == {"text": "out"}
        assert AsyncResult("slow", app=client).state == "STARTED"
        assert 0 < client.backend.client.ttl(client.backend.get_key_for_task("slow")) <= 86_400
