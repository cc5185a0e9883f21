"""When a moment comes: delayed jobs may start, jobs at risk become urgent, jobs past their deadline end."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from engine.growth import Growth
from engine.request import Generated, RequestId
from jobs import deadlines
from jobs.body import JobBody
from jobs.checkpoints import save
from jobs.claims import claim, models_with_work
from jobs.database import Database
from jobs.deadlines import (
    EXPIRED_ERROR,
    edges_of_risk,
    expire,
    has_due,
    has_late,
    make_due,
    make_urgent,
    risky_until,
)
from jobs.dialects import now
from jobs.intake import Intake
from jobs.leases import leave, register
from jobs.models import Batch, Checkpoint, Job, Worker
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.states import JobState
from jobs.sweeper import take_back
from jobs.tenants import OPERATOR
from jobs.terms import ORDINARY, Retry, Terms, Tier
from tests.support import rows
from tests.support.invariants import check_tallies

BODY = JobBody(prompt="x", max_tokens=1000)


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    return Intake(database, settings)


@pytest.fixture
def clock(database: Database) -> float:
    with database.read() as connection:
        return float(connection.scalars(select(now())).one())


def set_columns(database: Database, job_id: str, **columns: Any) -> None:
    database.transact(lambda c: c.execute(update(Job).where(Job.id == job_id).values(**columns)))


def take(database: Database, limit: int = 9) -> list[str]:
    database.transact(partial(register, worker_id="w", model="tiny", lease_seconds=60.0))
    return [c.job_id for c in database.transact(partial(claim, worker_id="w", model="tiny", limit=limit))]


def finish(database: Database, job_id: str, kind: Any, **fields: Any) -> JobState | None:
    outcome = Outcome(job_id=job_id, fence=rows.job(database, job_id).fence, kind=kind, **fields)
    (recorded,) = database.transact(lambda c: record(c, worker_id="w", outcomes=[outcome]))
    return recorded.state


def keep_parts(database: Database, *job_ids: str) -> None:
    """What a worker has made of jobs that it claimed for the first time."""
    made = (Generated(token_ids=(1, 2)),)
    growths = [Growth(id=RequestId(job_id, 1), starts=(0,), generated=made) for job_id in job_ids]
    saved = database.transact(partial(save, worker_id="w", weights="", growths=growths))
    assert len(saved) == len(job_ids)


def num_parts(database: Database) -> int:
    with database.read() as connection:
        return connection.scalar(select(func.count()).select_from(Checkpoint)) or 0


# --- not before -----------------------------------------------------------------------------------------------


def test_a_job_that_may_not_start_is_claimed_by_nobody(
    database: Database, intake: Intake, clock: float
) -> None:
    later = intake.accept_one(BODY, OPERATOR, terms=Terms(not_before=clock + 1000))
    assert take(database) == []
    with database.read() as connection:
        assert models_with_work(connection) == []
        assert not has_due(connection)
    assert database.transact(make_due) == 0
    assert rows.job(database, later).state == JobState.QUEUED


@pytest.mark.parametrize("tier", [Tier.NORMAL, Tier.BACKGROUND])
def test_when_its_time_has_come_it_takes_its_place(
    database: Database, intake: Intake, clock: float, tier: Tier
) -> None:
    later = intake.accept_one(BODY, OPERATOR, terms=Terms(not_before=clock + 1000, tier=tier))
    set_columns(database, later, not_before=clock - 1)
    with database.read() as connection:
        assert has_due(connection)
    assert database.transact(make_due) == 1
    assert database.transact(make_due) == 0
    assert rows.job(database, later).tier == tier
    assert take(database) == [later]


def test_a_delay_is_no_way_past_the_others(database: Database, intake: Intake, clock: float) -> None:
    heavy = JobBody(prompt="x", max_tokens=70_000)
    delayed = intake.accept_many([heavy] * 20, OPERATOR, terms=Terms(not_before=clock + 1000))
    intake.accept_many([heavy] * 20, OPERATOR)
    take(database, 10)
    database.transact(
        lambda c: c.execute(update(Job).where(Job.batch_id == delayed).values(not_before=clock - 1))
    )
    database.transact(make_due)
    mine = {row.batch_id for row in (rows.job(database, key) for key in take_more(database, 5))}
    assert delayed not in mine


def take_more(database: Database, limit: int) -> list[str]:
    return [c.job_id for c in database.transact(partial(claim, worker_id="w", model="tiny", limit=limit))]


# --- deadlines ------------------------------------------------------------------------------------------------


def test_a_queued_job_past_its_deadline_expires_and_its_batch_closes(
    database: Database, intake: Intake, clock: float
) -> None:
    batch = intake.accept_many([BODY, BODY], OPERATOR, terms=Terms(deadline=clock + 1000))
    in_time = intake.accept_one(BODY, OPERATOR, terms=Terms(deadline=clock + 1000))
    database.transact(
        lambda c: c.execute(update(Job).where(Job.batch_id == batch).values(deadline=clock - 1))
    )
    with database.read() as connection:
        assert has_late(connection)
    assert database.transact(expire) == 2
    assert database.transact(expire) == 0
    states = rows.jobs_by_state(database)
    assert len(states["expired"]) == 2
    assert states["queued"] == [in_time]
    assert rows.job(database, states["expired"][0]).error == EXPIRED_ERROR
    with database.read() as connection:
        assert connection.scalars(select(Batch.finished_at).where(Batch.id == batch)).one() is not None
        check_tallies(connection)


def test_a_delayed_job_expires_as_well(database: Database, intake: Intake, clock: float) -> None:
    job = intake.accept_one(BODY, OPERATOR, terms=Terms(not_before=clock + 500, deadline=clock + 1000))
    set_columns(database, job, deadline=clock - 1)
    assert database.transact(expire) == 1
    assert rows.job(database, job).state == JobState.EXPIRED


@pytest.mark.parametrize("kind", ["released", "completed"])
def test_a_running_job_is_stopped_and_ends_as_expired(
    database: Database, intake: Intake, clock: float, kind: str
) -> None:
    job = intake.accept_one(BODY, OPERATOR, terms=Terms(deadline=clock + 1000))
    assert take(database) == [job]
    keep_parts(database, job)
    set_columns(database, job, deadline=clock - 1)
    assert database.transact(expire) == 1
    assert rows.job(database, job).state == JobState.CANCELLING
    assert database.transact(expire) == 0
    assert finish(database, job, kind, prompt_tokens=3, completion_tokens=5) is JobState.EXPIRED
    assert rows.job(database, job).error == EXPIRED_ERROR
    assert rows.ledger(database) == [(job, 1, "wasted", 3, 5)]
    with database.read() as connection:
        assert not rows.results(database)
        check_tallies(connection)
    assert num_parts(database) == 0


def test_with_a_dead_worker_a_sweep_ends_it(database: Database, intake: Intake, clock: float) -> None:
    job = intake.accept_one(BODY, OPERATOR, terms=Terms(deadline=clock + 1000))
    plain = intake.accept_one(BODY, OPERATOR)
    take(database)
    set_columns(database, job, deadline=clock - 1)
    database.transact(expire)
    set_columns(database, plain, state=JobState.CANCELLING)
    database.transact(partial(leave, worker_id="w"))
    assert database.transact(take_back) == (0, 2)
    assert rows.job(database, job).state == JobState.EXPIRED
    assert rows.job(database, plain).state == JobState.CANCELLED


def test_of_an_expired_job_no_checkpoint_stays(database: Database, intake: Intake, clock: float) -> None:
    """Neither of one that had been handed back, nor of one whose worker is dead."""
    waiting, running = (
        intake.accept_one(BODY, OPERATOR, terms=Terms(deadline=clock + 1000)) for _ in range(2)
    )
    take(database)
    keep_parts(database, waiting, running)
    finish(database, waiting, "released")
    assert num_parts(database) == 2
    database.transact(lambda c: c.execute(update(Job).values(deadline=clock - 1)))
    assert database.transact(expire) == 2
    assert num_parts(database) == 1, "the worker may still be making some"
    database.transact(partial(leave, worker_id="w"))
    assert database.transact(take_back) == (0, 1)
    assert rows.jobs_by_state(database) == {"expired": sorted([waiting, running])}
    assert num_parts(database) == 0


def test_those_that_are_being_stopped_are_in_nobodys_way(
    database: Database, intake: Intake, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "MOVES_PER_SWEEP", 1)
    terms = Terms(deadline=clock + 1000)
    first, second = sorted(intake.accept_one(BODY, OPERATOR, terms=terms) for _ in range(2))
    assert sorted(take(database)) == [first, second]
    database.transact(lambda c: c.execute(update(Job).values(deadline=clock - 1)))
    assert database.transact(expire) == 1
    assert rows.job(database, first).state == JobState.CANCELLING
    finish(database, second, "released")
    assert database.transact(expire) == 1
    assert rows.job(database, second).state == JobState.EXPIRED


# --- at risk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "speed", "edge"),
    [
        ([], 100.0, None),
        ([(10_000.0, 1000)], 100.0, None),
        ([(10_000.0, 1_000_000)], 100.0, 10_000.0),  # 10,000 s of work
        ([(600.0, 100), (20_000.0, 100)], 100.0, None),
        ([(150.0, 100), (20_000.0, 100)], 100.0, 150.0),
        ([(9_000.0, 500_000), (10_000.0, 500_000)], 100.0, 10_000.0),  # only together too much
        ([(700.0, 1), (10_000.0, 1)], 0.0, None),
        ([(600.0, 1), (10_000.0, 1)], 0.0, 600.0),
    ],
)
def test_at_risk_is_what_would_only_just_be_done(
    spans: list[tuple[float, int]], speed: float, edge: float | None
) -> None:
    assert risky_until(spans, speed=speed, time_now=0.0) == edge


def test_jobs_at_risk_become_urgent_in_the_order_of_their_deadlines(
    database: Database, intake: Intake, clock: float
) -> None:
    far = intake.accept_one(BODY, OPERATOR, terms=Terms(deadline=clock + 80_000))
    near = [intake.accept_one(BODY, OPERATOR, terms=Terms(deadline=clock + s)) for s in (3000, 2000)]
    intake.accept_one(BODY, OPERATOR)
    database.transact(
        lambda c: c.execute(
            insert(Worker).values(
                id="fast",
                model="tiny",
                host="h",
                pid=1,
                state="ready",
                lease_until=clock + 900,
                started_at=clock,
                tokens_per_second=0.68,
                stats={},
            )
        )
    )  # 2,000 tokens are due within 3,000 s, 3,000 within 80,000 s
    with database.read() as connection:
        edges = edges_of_risk(connection)
    assert edges.keys() == {"tiny"}
    assert database.transact(partial(make_urgent, model="tiny", edge=edges["tiny"])) == 2
    assert take_more(database, 3)[:2] == near[::-1]
    assert rows.job(database, far).tier == Tier.NORMAL


def test_no_more_than_a_context_is_due_of_one_job(database: Database, intake: Intake, clock: float) -> None:
    greedy = BODY.model_copy(update={"max_tokens": 1_000_000})
    intake.accept_one(greedy, OPERATOR, terms=Terms(deadline=clock + 80_000))
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=900)
        connection.execute(update(Worker).values(tokens_per_second=1.0, max_model_len=1000))
    with database.read() as connection:
        assert edges_of_risk(connection) == {}
        assert risky_until([(clock + 80_000, 1_000_000)], speed=1.0, time_now=clock) is not None


def test_only_the_models_own_jobs_become_urgent(database: Database, intake: Intake, clock: float) -> None:
    body = BODY.model_copy(update={"model": "other"})
    other = intake.accept_one(body, OPERATOR, terms=Terms(deadline=clock + 100))
    assert database.transact(partial(make_urgent, model="tiny", edge=clock + 600)) == 0
    assert rows.job(database, other).tier == Tier.NORMAL
    assert database.transact(partial(make_urgent, model="other", edge=clock + 600)) == 1


# --- retries --------------------------------------------------------------------------------------------------

PASSING = {"code": "numerics", "message": "not finite", "param": None}
FINAL = {"code": "context_length_exceeded", "message": "too long", "param": "prompt"}


def test_a_passing_failure_is_tried_again_after_a_while(
    database: Database, intake: Intake, clock: float
) -> None:
    terms = Terms(retry=Retry(max_attempts=3, backoff_seconds=100.0, max_backoff_seconds=150.0))
    job = intake.accept_one(BODY, OPERATOR, terms=terms)
    for number, delay in ((1, 100.0), (2, 150.0)):
        assert (take(database) if number == 1 else take_more(database, 9)) == [job]
        fields = {"error": PASSING, "prompt_tokens": 3, "completion_tokens": 5, "kept_tokens": 4}
        assert finish(database, job, "failed", **fields) is JobState.QUEUED
        row = rows.job(database, job)
        assert (row.failures, row.error, row.worker_id) == (number, None, None)
        assert delay - 1 <= row.not_before - clock <= delay + 60
        assert take_more(database, 9) == []
        set_columns(database, job, not_before=clock - 1)
        database.transact(make_due)
    assert take_more(database, 9) == [job]
    assert finish(database, job, "failed", error=PASSING) is JobState.FAILED
    assert rows.job(database, job).error == PASSING
    assert rows.ledger(database) == [(job, 1, "wasted", 3, 5), (job, 2, "wasted", 3, 5)]
    with database.read() as connection:
        check_tallies(connection)


@pytest.mark.parametrize(
    ("terms", "error"), [(ORDINARY, PASSING), (Terms(retry=Retry(max_attempts=3)), FINAL)]
)
def test_others_fail_at_once(database: Database, intake: Intake, terms: Terms, error: dict[str, Any]) -> None:
    job = intake.accept_one(BODY, OPERATOR, terms=terms)
    assert take(database) == [job]
    assert finish(database, job, "failed", error=error) is JobState.FAILED


def test_an_urgent_job_that_is_tried_again_keeps_its_place_by_deadline(
    database: Database, intake: Intake, clock: float
) -> None:
    retry = Retry(max_attempts=3, backoff_seconds=10)
    late = intake.accept_one(BODY, OPERATOR, terms=Terms(deadline=clock + 500, retry=retry))
    soon = intake.accept_one(BODY, OPERATOR, terms=Terms(deadline=clock + 100))
    database.transact(partial(make_urgent, model="tiny", edge=clock + 600))
    assert take(database) == [soon, late]
    error = {"code": "numerics", "message": "NaN"}
    assert finish(database, late, "failed", error=error) is JobState.QUEUED
    finish(database, soon, "released")
    set_columns(database, late, not_before=clock - 1)
    database.transact(make_due)
    again = database.transact(partial(claim, worker_id="w", model="tiny", limit=9))
    assert [one.job_id for one in again] == [soon, late]
