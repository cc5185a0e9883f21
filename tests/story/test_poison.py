"""Engine deaths that keep meeting the same jobs: these run alone, and only a death while alone convicts."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from jobs.models import Job
from jobs.states import JobState
from tests.support.press import Press
from tests.support.processes import Process
from tests.support.stories import long_jobs
from tests.support.waiting import wait_until


@pytest.mark.long
def test_a_job_is_convicted_only_when_it_died_alone(press: Press) -> None:
    (worker,) = press.start_workers(1)
    batch_id = press.submit(long_jobs(3, 8000))
    for _ in range(2):  # max_crashes: these two deaths meet all three
        row = running(press, worker, 3)
        os.kill(row["engine_pid"], signal.SIGKILL)
        wait_until(
            lambda pid=row["engine_pid"]: engine_pid(press, worker) not in (None, pid), "the next engine", 60
        )
    row = running(press, worker, 1)
    crashes = [job.crashes for job in press.jobs(Job.batch_id == batch_id).values()]
    assert crashes == [2, 2, 2]
    os.kill(row["engine_pid"], signal.SIGKILL)
    states = press.finish()
    jobs = press.jobs(Job.batch_id == batch_id).values()
    assert sorted(job.state for job in jobs) == [JobState.COMPLETED, JobState.COMPLETED, JobState.FAILED]
    (convicted,) = [job for job in jobs if job.state == JobState.FAILED]
    assert convicted.error["code"] == "engine_crash"
    assert states[JobState.FAILED] >= 1


def running(press: Press, worker: Process, count: int) -> dict[str, Any]:
    """The worker's row once its engine runs exactly so many jobs."""

    def look() -> dict[str, Any] | None:
        row = press.worker(worker)
        return row if row and row["num_running"] == count and row["engine_pid"] else None

    return wait_until(look, f"{count} run", 30) or {}


def engine_pid(press: Press, worker: Process) -> int | None:
    row = press.worker(worker)
    return row["engine_pid"] if row and row["state"] == "ready" else None
