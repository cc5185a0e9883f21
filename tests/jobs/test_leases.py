"""Leases and sweeps: what a worker's death leaves behind is repaired, by the database's clock."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy import select, update

from jobs.body import parse_job
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.database import Database
from jobs.dialects import now
from jobs.intake import Intake
from jobs.leases import leave, register, renew
from jobs.models import Batch, Worker
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.states import JobState
from jobs.sweeper import Sweeper
from jobs.tenants import OPERATOR
from tests.support import rows


@pytest.fixture
def worker(database: Database) -> str:
    database.transact(partial(register, worker_id="w", model="tiny", lease_seconds=60.0))
    return "w"


def expire(database: Database, worker_id: str) -> None:
    database.transact(
        lambda c: c.execute(update(Worker).where(Worker.id == worker_id).values(lease_until=now() - 1))
    )


def sweep(database: Database) -> list[str]:
    announced: list[str] = []
    Sweeper(database, 1.0, announced.append).sweep()
    return announced


def test_a_living_worker_keeps_its_jobs(database: Database, worker: str, submit) -> None:
    submit(2)
    database.transact(partial(claim, worker_id=worker, model="tiny", limit=1))
    assert sweep(database) == ["tiny"]
    assert {state: len(ids) for state, ids in rows.jobs_by_state(database).items()} == {
        "in_progress": 1,
        "queued": 1,
    }


def test_an_expired_lease_gives_the_jobs_back(database: Database, worker: str, submit) -> None:
    (job_id,) = submit(1)
    database.transact(partial(claim, worker_id=worker, model="tiny", limit=1))
    expire(database, worker)
    database.transact(partial(register, worker_id="other", model="tiny", lease_seconds=60.0))
    assert sweep(database) == ["tiny"]
    assert rows.jobs_by_state(database) == {"queued": [job_id]}
    assert rows.ledger(database) == [(job_id, 1, "wasted", 0, 0)]
    late = Outcome(job_id=job_id, fence=1, kind="completed", outputs=[{"text": "late"}])
    (recorded,) = database.transact(partial(record, worker_id=worker, outcomes=[late]))
    assert recorded.state is None
    assert rows.results(database) == {}


def test_an_expired_lease_that_nobody_swept_is_renewed(database: Database, worker: str) -> None:
    expire(database, worker)
    assert database.transact(partial(renew, worker_id=worker, lease_seconds=60.0, report={})) is not None
    assert sweep(database) == []
    assert database.transact(partial(renew, worker_id=worker, lease_seconds=60.0, report={})) is not None


def test_a_swept_lease_is_gone_for_good(database: Database, worker: str) -> None:
    expire(database, worker)
    sweep(database)
    assert database.transact(partial(renew, worker_id=worker, lease_seconds=60.0, report={})) is None


def test_a_renewal_brings_the_cancels(database: Database, worker: str, submit) -> None:
    first, second = submit(2)
    database.transact(partial(claim, worker_id=worker, model="tiny", limit=2))
    Cancels(database).cancel_job(second, tenant="default")
    renewal = database.transact(partial(renew, worker_id=worker, lease_seconds=60.0, report={}))
    assert renewal is not None
    assert renewal.held == {(first, 1): False, (second, 1): True}


def test_a_dead_workers_cancel_is_ended_and_its_batch_closed(
    database: Database, worker: str, settings: Settings
) -> None:
    batch_id = Intake(database, settings).accept_many([parse_job({"prompt": "x"}, settings)], OPERATOR)
    database.transact(partial(claim, worker_id=worker, model="tiny", limit=1))
    Cancels(database).cancel_batch(batch_id, tenant="default")
    expire(database, worker)
    sweep(database)
    assert list(rows.jobs_by_state(database)) == [JobState.CANCELLED]
    with database.read() as connection:
        assert connection.scalar(select(Batch.state).where(Batch.id == batch_id)) == "cancelled"


def test_leaving_frees_what_is_left_at_once(database: Database, worker: str, submit) -> None:
    (job_id,) = submit(1)
    database.transact(partial(claim, worker_id=worker, model="tiny", limit=1))
    database.transact(partial(leave, worker_id=worker))
    sweep(database)
    assert rows.jobs_by_state(database) == {"queued": [job_id]}


def test_jobs_under_a_name_that_nobody_has_are_taken_back(database: Database, submit) -> None:
    (job_id,) = submit(1)
    database.transact(partial(claim, worker_id="never registered", model="tiny", limit=1))
    sweep(database)
    assert rows.jobs_by_state(database) == {"queued": [job_id]}


def test_what_a_dead_worker_was_told_to_stop_is_booked_as_cancelled(
    database: Database, worker: str, submit
) -> None:
    running, stopping = submit(2)
    database.transact(partial(claim, worker_id=worker, model="tiny", limit=2))
    Cancels(database).cancel_job(stopping, tenant="default")
    expire(database, worker)
    sweep(database)
    assert rows.ledger(database) == [(running, 1, "wasted", 0, 0), (stopping, 1, "cancelled", 0, 0)]


def test_workers_that_never_loaded_are_forgotten_a_day_later(database: Database) -> None:
    """What the others knew of their speed, and that their model was ever served, stays."""
    for name, age, loaded in (("old", 90_000, None), ("lately", 80_000, None), ("served", 90_000, 512)):
        with database.write() as connection:
            register(connection, worker_id=name, model="tiny", lease_seconds=60)
            row = update(Worker).where(Worker.id == name)
            connection.execute(row.values(lease_until=now() - age, max_model_len=loaded))
    with database.write() as connection:
        register(connection, worker_id="new", model="tiny", lease_seconds=60)
    with database.read() as connection:
        assert set(connection.scalars(select(Worker.id))) == {"lately", "served", "new"}
