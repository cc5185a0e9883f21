"""Outcomes: one transaction, one result, and nothing from a stale fence."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy.exc import DBAPIError

from jobs.cancels import Cancels
from jobs.claims import Claim, claim
from jobs.database import Database
from jobs.outcomes import Outcome, record
from jobs.states import JobState
from tests.support import rows

OUTPUTS = [{"index": 0, "text": "ok\x00", "finish_reason": "stop", "stop_reason": None}]


def take(database: Database, limit: int = 10, worker: str = "w") -> list[Claim]:
    return database.transact(partial(claim, worker_id=worker, model="tiny", limit=limit))


def completed(item: Claim) -> Outcome:
    return Outcome(
        job_id=item.job_id,
        fence=item.fence,
        kind="completed",
        outputs=OUTPUTS,
        prompt_tokens=3,
        completion_tokens=5,
    )


def write(database: Database, *outcomes: Outcome, worker: str = "w") -> list[JobState | None]:
    recorded = database.transact(partial(record, worker_id=worker, outcomes=outcomes))
    return [item.state for item in recorded]


def test_result_ledger_and_state_go_together(database: Database, submit) -> None:
    (job_id,) = submit(1)
    (item,) = take(database)
    assert write(database, completed(item)) == [JobState.COMPLETED]
    assert rows.results(database)[job_id].outputs == OUTPUTS
    assert rows.ledger(database) == [(job_id, 1, "billed", 3, 5)]
    row = rows.job(database, job_id)
    assert (row.state, row.worker_id) == ("completed", None)
    assert row.finished_at is not None


def test_the_same_transaction_twice_changes_nothing_and_says_so(database: Database, submit) -> None:
    submit(1)
    (item,) = take(database)
    assert write(database, completed(item)) == write(database, completed(item)) == [JobState.COMPLETED]
    assert len(rows.results(database)) == len(rows.ledger(database)) == 1


def test_a_stale_fence_writes_nothing(database: Database, submit) -> None:
    submit(1)
    (old,) = take(database, worker="dead")
    write(database, Outcome(job_id=old.job_id, fence=1, kind="released"), worker="dead")
    (new,) = take(database)
    assert new.fence == 2
    assert write(database, completed(old), worker="dead") == [None]
    assert write(database, completed(old)) == [None]
    assert rows.results(database) == {}
    assert rows.job(database, old.job_id).state == "in_progress"


def test_released_work_is_booked_as_wasted(database: Database, submit) -> None:
    (job_id,) = submit(1)
    (item,) = take(database)
    outcome = Outcome(job_id=job_id, fence=item.fence, kind="released", completion_tokens=7, crashes=1)
    assert write(database, outcome) == [JobState.QUEUED]
    assert rows.ledger(database) == [(job_id, 1, "wasted", 0, 7)]
    assert rows.job(database, job_id).crashes == 1


def test_a_cancel_that_was_accepted_beats_the_answer(database: Database, submit) -> None:
    (job_id,) = submit(1)
    (item,) = take(database)
    assert Cancels(database).cancel_job(job_id, tenant="default") is JobState.CANCELLING
    assert write(database, completed(item)) == [JobState.CANCELLED]
    assert rows.results(database) == {}
    assert rows.ledger(database) == [(job_id, 1, "cancelled", 3, 5)]


def test_failed_keeps_its_reason(database: Database, submit) -> None:
    (job_id,) = submit(1)
    (item,) = take(database)
    error = {"code": "numerics", "message": "the model's logits were not finite"}
    assert write(database, Outcome(job_id=job_id, fence=item.fence, kind="failed", error=error)) == [
        JobState.FAILED
    ]
    assert rows.job(database, job_id).error == error


def test_a_group_is_judged_row_by_row(database: Database, submit) -> None:
    submit(4)
    a, b, c, d = take(database)
    states = write(
        database,
        completed(d),
        Outcome(job_id=a.job_id, fence=a.fence, kind="failed", error={"code": "x", "message": "y"}),
        Outcome(job_id=b.job_id, fence=b.fence, kind="released"),
        Outcome(job_id=c.job_id, fence=c.fence + 1, kind="released"),
    )
    assert states == [JobState.COMPLETED, JobState.FAILED, JobState.QUEUED, None]


def test_terminal_states_are_immutable_in_the_database_itself(database: Database, submit) -> None:
    submit(1)
    (item,) = take(database)
    write(database, completed(item))
    with pytest.raises(DBAPIError, match="terminal"):
        database.transact(lambda c: c.exec_driver_sql("UPDATE jobs SET state = 'queued'"))


def test_a_suspect_that_is_handed_back_stays_one(database: Database, submit) -> None:
    (job_id,) = submit(1)
    take(database)
    write(database, Outcome(job_id=job_id, fence=1, kind="released", crashes=2))
    take(database)
    assert write(database, Outcome(job_id=job_id, fence=2, kind="released")) == [JobState.QUEUED]
    assert rows.job(database, job_id).crashes == 2
