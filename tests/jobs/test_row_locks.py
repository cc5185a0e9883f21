"""Two transactions that meet at one job: one waits for the other, or passes over what it holds, and what comes out is
what one after the other would give. On PostgreSQL, because SQLite lets one writer in at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

import pytest
from sqlalchemy import Connection, func, select, text

from engine.growth import Growth
from engine.request import Generated, RequestId
from jobs.body import JobBody
from jobs.cancels import Cancels
from jobs.checkpoints import save
from jobs.claims import claim
from jobs.database import Database
from jobs.intake import Intake, TaskMessage
from jobs.models import Batch, Checkpoint
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.states import BatchState, JobState
from jobs.sweeper import take_back
from jobs.tenants import DEFAULT, OPERATOR
from jobs.terms import Retry, Terms
from tests.support import rows
from tests.support.invariants import check_tallies
from tests.support.waiting import wait_until

T = TypeVar("T")

pytestmark = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


def meet(database: Database, first: Callable[[Connection], Any], second: Callable[[], T]) -> T:
    """What `second` returns, which begins when `first` has been done and is not committed. That comes as soon as
    `second` waits for it, or is through."""
    with ThreadPoolExecutor(1) as pool:
        with database.write() as connection:
            first(connection)
            begun = pool.submit(second)
            wait_until(lambda: begun.done() or somebody_waits(database), "they meet")
        return begun.result()


def somebody_waits(database: Database) -> bool:
    query = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND backend_type = 'client backend' AND wait_event_type = 'Lock'"
    )
    with database.read() as connection:
        return bool(connection.scalar(text(query)))


def take(connection: Connection) -> None:
    claim(connection, worker_id="w", model="tiny", limit=9)


def end(
    connection: Connection, job_id: str, kind: Literal["completed", "failed", "released"], code: str = ""
) -> JobState | None:
    outcome = Outcome(
        job_id=job_id,
        fence=1,
        kind=kind,
        outputs=[{"text": "x"}],
        error={"code": code, "message": "it failed", "param": None} if code else None,
        prompt_tokens=3,
    )
    (recorded,) = record(connection, worker_id="w", outcomes=[outcome])
    return recorded.state


def keep(connection: Connection, job_id: str) -> set[RequestId]:
    made = (Generated(token_ids=(1, 2)),)
    part = Growth(id=RequestId(job_id, 1), starts=(0,), generated=made)
    return save(connection, worker_id="w", weights="", growths=[part])


def num_parts(database: Database) -> int:
    with database.read() as connection:
        return connection.scalar(select(func.count()).select_from(Checkpoint)) or 0


@pytest.fixture
def held(database: Database, settings: Settings) -> str:
    """The only job of a batch, at a worker that nobody knows, so that a sweep takes it back."""
    Intake(database, settings).accept_many([JobBody(prompt="a")], OPERATOR)
    (job_id,) = rows.jobs_by_state(database)["queued"]
    database.transact(take)
    return job_id


def test_a_part_waits_for_the_end_of_its_job_and_is_not_written(database: Database, held: str) -> None:
    saved = meet(
        database, lambda c: end(c, held, "completed"), lambda: database.transact(partial(keep, job_id=held))
    )
    assert saved == set()
    assert num_parts(database) == 0


def test_an_end_waits_for_a_part_and_takes_it_along(database: Database, held: str) -> None:
    state = meet(
        database,
        partial(keep, job_id=held),
        lambda: database.transact(partial(end, job_id=held, kind="completed")),
    )
    assert state is JobState.COMPLETED
    assert num_parts(database) == 0


def test_a_failure_that_is_tried_again_touches_no_batch(database: Database, settings: Settings) -> None:
    """Batches are locked in the order of their ids, and these two locks would come out of it."""
    retried = Terms(retry=Retry(max_attempts=2))
    batch_id = Intake(database, settings).accept_many([JobBody(prompt="a")], OPERATOR, terms=retried)
    (job_id,) = rows.jobs_by_state(database)["queued"]
    database.transact(take)
    batch = select(Batch.id).where(Batch.id == batch_id).with_for_update(nowait=True)
    with database.write() as connection:
        assert end(connection, job_id, "failed", code="engine_crash") is JobState.QUEUED
        assert database.transact(lambda other: other.scalar(batch), patience=0) == batch_id
    row = rows.job(database, job_id)
    assert (row.failures, row.worker_id, row.error, row.finished_at) == (1, None, None, None)
    assert row.not_before is not None


def test_a_sweep_passes_over_a_job_that_is_just_ending(database: Database, held: str) -> None:
    with database.write() as connection:
        end(connection, held, "completed")
        # from a second connection; if it waited, it would run into the lock's timeout
        assert database.transact(take_back, patience=0) == (0, 0)
    assert rows.jobs_by_state(database) == {"completed": [held]}
    assert rows.ledger(database) == [(held, 1, "billed", 3, 0)]


def test_two_sweeps_take_a_job_back_once(database: Database, held: str) -> None:
    swept = meet(database, take_back, lambda: database.transact(take_back))
    assert swept == (0, 0)
    assert rows.jobs_by_state(database) == {"queued": [held]}
    assert rows.ledger(database) == [(held, 1, "wasted", 0, 0)]


def test_a_result_waits_for_the_sweep_that_takes_its_job_back_and_is_dropped(
    database: Database, held: str
) -> None:
    state = meet(database, take_back, lambda: database.transact(partial(end, job_id=held, kind="completed")))
    assert state is None
    assert rows.jobs_by_state(database) == {"queued": [held]}
    assert rows.results(database) == {}


@pytest.mark.parametrize(
    ("kind", "state"), [("completed", JobState.COMPLETED), ("released", JobState.CANCELLED)]
)
def test_a_cancel_waits_for_what_its_worker_is_writing(
    database: Database, held: str, kind: Literal["completed", "released"], state: JobState
) -> None:
    """A result that comes first stands; a job that is handed back is not lost sight of."""
    answer = meet(
        database,
        lambda c: end(c, held, kind),
        lambda: Cancels(database).cancel_job(held, tenant=DEFAULT),
    )
    assert answer is state
    assert rows.job(database, held).state == state
    with database.read() as connection:
        check_tallies(connection)
        assert connection.scalar(select(Batch.state)) == BatchState.COMPLETED


def test_a_revoke_of_what_waits_lets_go_on_what_was_just_claimed(
    database: Database, settings: Settings
) -> None:
    Intake(database, settings).accept_messages([TaskMessage("task", JobBody(prompt="a"), DEFAULT)])
    answer = meet(database, take, lambda: Cancels(database).revoke("task", running=False))
    assert answer is JobState.IN_PROGRESS
    assert rows.job(database, "task").state == JobState.IN_PROGRESS
