"""Leaving in good order: a drain, and cancels. Nobody waits for a lease to run out."""

from __future__ import annotations

import signal
import time

from sqlalchemy import func, select

from jobs.models import Job, LedgerEntry, Result, Worker
from jobs.states import HELD, JobState, LedgerKind, WorkerState
from tests.support.press import RENEW_SECONDS, SLACK_SECONDS, START_SECONDS, Press
from tests.support.stories import long_jobs, short_jobs
from tests.support.waiting import wait_until


def test_sigterm_drains(press: Press) -> None:
    """What fits into the grace period ends, the rest is back in the queue when the process is gone."""
    (worker,) = press.start_workers(1)
    batch_id = press.submit(short_jobs(20) + long_jobs(60, 1000))
    row = wait_until(lambda: press.held_by(worker) and press.worker(worker), "it holds jobs", START_SECONDS)
    wait_until(
        lambda: press.jobs(Job.batch_id == batch_id, Job.state == JobState.COMPLETED),
        "some are done",
        START_SECONDS,
    )

    assert worker.terminate(30) == 0, worker.tail()

    assert not press.jobs(Job.state.in_(sorted(HELD))), "no job waits for a lease to expire"
    assert press.jobs(Job.state == JobState.QUEUED), "there was too much for the grace period"
    with press.database.read() as connection:
        state = connection.scalar(select(Worker.state).where(Worker.id == row["id"]))
    assert state == WorkerState.STOPPED
    left = press.jobs(Job.state == JobState.QUEUED)
    assert press.http.post(f"/v1/batches/{batch_id}/cancel").status_code == 200
    counts = press.finish(5)
    assert counts[JobState.CANCELLED] == len(left)
    assert counts[JobState.FAILED] == 0


def test_ctrl_c_drains_too(press: Press) -> None:
    (worker,) = press.start_workers(1)
    batch_id = press.submit(long_jobs(60, 1000))
    wait_until(lambda: press.held_by(worker), "it holds jobs", START_SECONDS)
    worker.signal(signal.SIGINT)
    assert worker.wait(30) == 0, worker.tail()
    assert not press.jobs(Job.state.in_(sorted(HELD))), "no job waits for a lease to expire"
    assert press.http.post(f"/v1/batches/{batch_id}/cancel").status_code == 200
    press.finish(5)


def test_handed_back_jobs_run_elsewhere(press: Press) -> None:
    """A drain beside a second worker: the jobs it hands back are done by the other."""
    workers = press.start_workers(2)
    batch_id = press.submit(long_jobs(60, 600))
    wait_until(
        lambda: not press.jobs(Job.batch_id == batch_id, Job.state == JobState.QUEUED),
        "the two hold all of them",
        START_SECONDS,
    )
    leaving = max(workers, key=lambda worker: len(press.held_by(worker)))
    assert leaving.terminate(30) == 0, leaving.tail()
    assert press.finish() == {JobState.COMPLETED: 60}


def test_cancel_of_a_running_job(press: Press) -> None:
    """Its pages are free within one step and one renewal, and no result appears."""
    (worker,) = press.start_workers(1)

    def free_pages() -> tuple[int, int]:
        row = press.worker(worker)
        assert row is not None
        stats = row["stats"]  # what is only remembered can be had as well
        free = stats.get("num_free_pages", 0) + stats.get("num_cached_pages", 0)
        return free, stats.get("num_pages", 0)

    job_id = press.submit_one(long_jobs(1, 8000)[0])

    def pages_in_use() -> bool:
        free, total = free_pages()
        return free < total

    wait_until(pages_in_use, "the job has pages", START_SECONDS)
    answer = press.http.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelling"
    asked_at = time.monotonic()
    wait_until(
        lambda: press.http.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled",
        "the job is cancelled",
        RENEW_SECONDS + SLACK_SECONDS,
    )
    print(f"a running job was cancelled after {time.monotonic() - asked_at:.2f} s")
    # The engine's figures come with the worker's next renewal.
    wait_until(lambda: not pages_in_use(), "its pages are free", 2 * RENEW_SECONDS + SLACK_SECONDS)
    press.finish()
    with press.database.read() as connection:
        assert connection.scalar(select(func.count()).where(Result.job_id == job_id)) == 0
        entry = connection.execute(
            select(LedgerEntry.kind, LedgerEntry.completion_tokens).where(LedgerEntry.job_id == job_id)
        ).one()
    assert entry.kind == LedgerKind.CANCELLED
    assert 0 < entry.completion_tokens < 8000, "the tokens made are on record, apart from what is billed"


def test_cancel_of_a_batch(press: Press) -> None:
    """Queued and running jobs alike; what was done stays done."""
    press.start_workers(1)
    batch_id = press.submit(short_jobs(10) + long_jobs(60, 1000))
    wait_until(
        lambda: press.jobs(Job.batch_id == batch_id, Job.state == JobState.COMPLETED),
        "some are done",
        START_SECONDS,
    )
    answer = press.http.post(f"/v1/batches/{batch_id}/cancel")
    assert answer.status_code == 200, answer.text
    wait_until(lambda: press.batch(batch_id)["status"] == "cancelled", "the batch is cancelled", 10)
    counts = press.finish(5)
    assert counts[JobState.COMPLETED] > 0
    assert counts[JobState.CANCELLED] > 0
