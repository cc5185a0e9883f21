"""Cancels, and the rule by which a batch closes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import event, select, update
from sqlalchemy.exc import DBAPIError

from jobs.batches import close_batches
from jobs.body import JobBody
from jobs.cancels import Cancels, half_cancelled
from jobs.claims import claim
from jobs.database import Database
from jobs.intake import Intake, TaskMessage
from jobs.leases import register
from jobs.models import Batch, Job
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.states import OPEN, TERMINAL, BatchState, JobState
from jobs.tenants import OPERATOR, Tenants
from tests.support import rows
from tests.support.invariants import check_tallies

WORKER = "w"


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    with database.write() as connection:
        register(connection, worker_id=WORKER, model="tiny", lease_seconds=60)
    return Intake(database, settings)


@pytest.fixture
def cancels(database: Database) -> Cancels:
    return Cancels(database)


def take(database: Database, limit: int) -> list[str]:
    with database.write() as connection:
        claims = claim(connection, worker_id=WORKER, model="tiny", limit=limit)
    return [one.job_id for one in claims]


def finish(database: Database, *job_ids: str, kind: str = "completed") -> None:
    outcomes = [Outcome(job_id=job_id, fence=1, kind=kind) for job_id in job_ids]  # type: ignore[arg-type]
    database.transact(lambda connection: record(connection, worker_id=WORKER, outcomes=outcomes))


def batch(database: Database, batch_id: str) -> object:
    with database.read() as connection:
        return connection.execute(select(Batch.__table__).where(Batch.id == batch_id)).one()


def state_of(database: Database, batch_id: str) -> str:
    with database.read() as connection:
        return connection.scalars(select(Batch.state).where(Batch.id == batch_id)).one()


def test_a_queued_job_is_cancelled_at_once(database: Database, intake: Intake, cancels: Cancels) -> None:
    job_id = intake.accept_one(JobBody(prompt="a"), OPERATOR)
    assert cancels.cancel_job(job_id, tenant="default") is JobState.CANCELLED
    row = rows.job(database, job_id)
    assert row.state == JobState.CANCELLED
    assert row.finished_at >= row.created_at
    assert take(database, 10) == []
    assert cancels.cancel_job(job_id, tenant="default") is JobState.CANCELLED
    assert rows.job(database, job_id).finished_at == row.finished_at


def test_a_held_job_is_cancelling_until_its_worker_answers(
    database: Database, intake: Intake, cancels: Cancels
) -> None:
    job_id = intake.accept_one(JobBody(prompt="a"), OPERATOR)
    take(database, 1)
    assert cancels.cancel_job(job_id, tenant="default") is JobState.CANCELLING
    assert cancels.cancel_job(job_id, tenant="default") is JobState.CANCELLING
    assert rows.job(database, job_id).worker_id == WORKER
    finish(database, job_id)  # its result came, but after the cancel
    assert rows.job(database, job_id).state == JobState.CANCELLED
    assert rows.results(database) == {}


def test_a_revoke_reaches_what_came_through_redis(
    database: Database, intake: Intake, cancels: Cancels
) -> None:
    Tenants(database).create("other")
    over_http = intake.accept_one(JobBody(prompt="a"), OPERATOR)
    intake.accept_messages([TaskMessage("held", JobBody(prompt="a"), "other")])
    assert set(take(database, 2)) == {over_http, "held"}
    intake.accept_messages([TaskMessage("queued", JobBody(prompt="a"), "default")])
    assert cancels.revoke("queued", running=False) is JobState.CANCELLED
    assert cancels.revoke("held", running=False) is JobState.IN_PROGRESS
    assert cancels.revoke("held", running=True) is JobState.CANCELLING
    assert cancels.revoke(over_http, running=True) is None, "HTTP's jobs are cancelled by their tenants"
    assert rows.job(database, over_http).state == JobState.IN_PROGRESS


def test_an_ended_job_stays_as_it_is(database: Database, intake: Intake, cancels: Cancels) -> None:
    done, failed = (intake.accept_one(JobBody(prompt=text), OPERATOR) for text in "ab")
    take(database, 2)
    finish(database, done)
    finish(database, failed, kind="failed")
    assert cancels.cancel_job(done, tenant="default") is JobState.COMPLETED
    assert cancels.cancel_job(failed, tenant="default") is JobState.FAILED
    assert cancels.cancel_job("job_unknown", tenant="default") is None
    assert cancels.cancel_batch("batch_unknown", tenant="default") is None


def test_a_batch_of_queued_jobs_is_cancelled_at_once(
    database: Database, intake: Intake, cancels: Cancels
) -> None:
    batch_id = intake.accept_many([JobBody(prompt="a")] * 1_100, OPERATOR)
    assert cancels.cancel_batch(batch_id, tenant="default") is BatchState.CANCELLED
    assert set(rows.jobs_by_state(database)) == {"cancelled"}
    row = batch(database, batch_id)
    assert row.finished_at >= row.cancelling_at >= row.created_at  # type: ignore[attr-defined]


def test_a_batch_with_held_jobs_is_cancelling_until_the_last_one_ends(
    database: Database, intake: Intake, cancels: Cancels
) -> None:
    batch_id = intake.accept_many([JobBody(prompt="a")] * 5, OPERATOR)
    first, second, third = take(database, 3)
    finish(database, first)
    assert cancels.cancel_batch(batch_id, tenant="default") is BatchState.CANCELLING
    assert {state: len(ids) for state, ids in rows.jobs_by_state(database).items()} == {
        "completed": 1,
        "cancelling": 2,
        "cancelled": 2,
    }
    finish(database, second)
    assert state_of(database, batch_id) == BatchState.CANCELLING
    finish(database, third, kind="released")
    assert state_of(database, batch_id) == BatchState.CANCELLED
    assert len(rows.results(database)) == 1
    assert cancels.cancel_batch(batch_id, tenant="default") is BatchState.CANCELLED


def test_a_completed_batch_is_not_cancelled(database: Database, intake: Intake, cancels: Cancels) -> None:
    batch_id = intake.accept_many([JobBody(prompt="a")] * 2, OPERATOR)
    finish(database, *take(database, 2))
    assert state_of(database, batch_id) == BatchState.COMPLETED
    assert cancels.cancel_batch(batch_id, tenant="default") is BatchState.COMPLETED


def test_cancelling_the_last_open_job_closes_its_batch(
    database: Database, intake: Intake, cancels: Cancels
) -> None:
    batch_id = intake.accept_many([JobBody(prompt="a")] * 2, OPERATOR)
    (first,) = take(database, 1)
    (second,) = rows.jobs_by_state(database)["queued"]
    cancels.cancel_job(second, tenant="default")
    assert state_of(database, batch_id) == BatchState.IN_PROGRESS
    finish(database, first)
    assert state_of(database, batch_id) == BatchState.COMPLETED


def test_closing_passes_over_what_is_open_closed_or_none(database: Database, intake: Intake) -> None:
    running = intake.accept_many([JobBody(prompt="a")], OPERATOR)
    ended = intake.accept_many([JobBody(prompt="b")], OPERATOR)
    with database.write() as connection:
        connection.execute(
            update(Job).where(Job.batch_id == ended).values(state=JobState.EXPIRED, finished_at=1.0)
        )
        assert close_batches(connection, [None, running, ended, "batch_unknown", ended]) == [ended]
        assert close_batches(connection, [running, ended]) == []
        assert close_batches(connection, []) == []
    assert state_of(database, running) == BatchState.IN_PROGRESS


def test_writers_that_end_the_last_jobs_together_close_the_batch(database: Database, intake: Intake) -> None:
    for _ in range(5):
        batch_id = intake.accept_many([JobBody(prompt="a")] * 4, OPERATOR)
        ids = take(database, 4)
        gate = threading.Barrier(4)

        def end(job_id: str, gate: threading.Barrier = gate) -> None:
            gate.wait()
            finish(database, job_id)

        threads = [threading.Thread(target=end, args=(job_id,)) for job_id in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert state_of(database, batch_id) == BatchState.COMPLETED


def test_a_cancel_that_meets_a_result_leaves_one_truth(
    database: Database, intake: Intake, cancels: Cancels
) -> None:
    for _ in range(10):
        job_id = intake.accept_one(JobBody(prompt="a"), OPERATOR)
        take(database, 1)
        gate = threading.Barrier(2)
        answers: list[JobState | None] = []

        def cancel(
            job_id: str = job_id, gate: threading.Barrier = gate, answers: list[JobState | None] = answers
        ) -> None:
            gate.wait()
            answers.append(cancels.cancel_job(job_id, tenant="default"))

        thread = threading.Thread(target=cancel)
        thread.start()
        gate.wait()
        finish(database, job_id)
        thread.join()
        state = rows.job(database, job_id).state
        assert (answers[0], state) in [
            (JobState.COMPLETED, JobState.COMPLETED),
            (JobState.CANCELLING, JobState.CANCELLED),
        ]
        assert (job_id in rows.results(database)) is (state == JobState.COMPLETED)


@pytest.mark.parametrize("ended", sorted(TERMINAL))
def test_the_database_itself_refuses_to_move_an_ended_job(
    database: Database, intake: Intake, ended: JobState
) -> None:
    job_id = intake.accept_one(JobBody(prompt="a"), OPERATOR)
    move = update(Job).where(Job.id == job_id)
    with database.write() as connection:
        connection.execute(move.values(state=ended))
    for state in sorted((OPEN | TERMINAL) - {ended}):
        with pytest.raises(DBAPIError, match="terminal"), database.write() as connection:
            connection.execute(move.values(state=state))
    with database.write() as connection:
        connection.execute(move.values(state=ended, finished_at=1.0))
    assert rows.job(database, job_id).state == ended


def test_a_batch_that_nobody_cancels_is_not_half_cancelled(database: Database, intake: Intake) -> None:
    intake.accept_many([JobBody(prompt="a")] * 2, OPERATOR)
    take(database, 1)
    with database.read() as connection:
        assert half_cancelled(connection) == []


def test_all_that_waits_for_a_model_is_cancelled_whoevers_it_is(
    database: Database, intake: Intake, cancels: Cancels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some at a time; what runs is stopped by its worker, and other models are left alone."""
    monkeypatch.setattr("jobs.cancels.PORTION", 3)
    Tenants(database).create("blog")
    bodies = [JobBody(prompt="x")] * 4
    running, others = intake.accept_many(bodies, OPERATOR), intake.accept_many(bodies, OPERATOR)
    assert len(take(database, 2)) == 2
    intake.accept_messages([TaskMessage("m", JobBody(prompt="x", model="tiny"), "blog")])
    kept = intake.accept_one(JobBody(prompt="x", model="another"), OPERATOR)
    told: list[int] = []
    assert cancels.cancel_model("tiny", told.append).jobs == {JobState.CANCELLED: 7, JobState.CANCELLING: 2}
    assert told == [3, 3, 1, 2]
    assert rows.job(database, "m").state == JobState.CANCELLED
    assert rows.job(database, kept).state == JobState.QUEUED
    assert state_of(database, others) != BatchState.IN_PROGRESS
    assert state_of(database, running) == BatchState.IN_PROGRESS, "until its worker has stopped what it runs"
    with database.read() as connection:
        check_tallies(connection)
    assert cancels.cancel_model("tiny") == ({}, 0)


def test_what_is_handed_back_meanwhile_is_cancelled_with_its_model(
    database: Database, intake: Intake, cancels: Cancels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.cancels.PORTION", 1)
    intake.accept_many([JobBody(prompt="x")] * 2, OPERATOR)
    held = take(database, 2)

    def hand_back(num_jobs: int) -> None:
        finish(database, *held, kind="released")

    assert cancels.cancel_model("tiny", hand_back).jobs == {JobState.CANCELLED: 1, JobState.CANCELLING: 1}
    assert set(rows.jobs_by_state(database)) == {"cancelled"}


def test_who_cancels_a_model_looks_into_indexes(database: Database, intake: Intake, cancels: Cancels) -> None:
    """Or each portion of a long queue would pass over all that were cancelled before."""
    intake.accept_many([JobBody(prompt="x")] * 3000, OPERATOR)
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        if "FROM jobs" in statement and "LIMIT" in statement:
            asked.append((statement, parameters))

    with database.write() as connection:
        connection.exec_driver_sql("ANALYZE")
    event.listen(database.engine, "before_cursor_execute", note)
    assert cancels.cancel_model("tiny").jobs == {JobState.CANCELLED: 3000}
    event.remove(database.engine, "before_cursor_execute", note)
    how = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
    with database.read() as connection:
        for index, (statement, parameters) in (("ix_jobs_claim", asked[0]), ("ix_jobs_held", asked[-2])):
            plan = str(connection.exec_driver_sql(f"{how} {statement}", parameters).all())
            assert index in plan, plan
