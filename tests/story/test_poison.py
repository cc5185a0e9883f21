"""A job that kills every engine it runs in: it is found by halving, fails alone, and the others do not notice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from jobs.models import Job
from jobs.states import JobState
from tests.support.press import START_SECONDS, Press
from tests.support.stories import short_jobs
from tests.support.taps import POISON, Tap
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long


@pytest.mark.parametrize("running", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("death", "num_jobs"), [("exit", 200), ("kill", 12)])
def test_one_fails_and_the_others_lose_nothing(
    press: Press, tmp_path: Path, death: str, num_jobs: int
) -> None:
    for process in press.live_workers():
        process.terminate(START_SECONDS)
    jobs = [job for job in short_jobs(num_jobs) if job["seed"] != POISON]
    poisoned = num_jobs * 2 // 3
    jobs[poisoned] |= {"seed": POISON}
    worker = press.start("worker", ["worker"], Tap(tmp_path / "tap", death).environment)
    batch_id = press.submit(jobs)
    counts = press.finish(timeout=240)
    rows = press.jobs(Job.batch_id == batch_id)
    (failed,) = [job for job in rows.values() if job.state == JobState.FAILED]
    assert failed.position == poisoned
    assert failed.error["code"] == "engine_crash"
    assert counts[JobState.FAILED] == 1

    row = press.worker(worker)
    assert row is not None
    deaths = row["engine_starts"] - 1
    first = 1 if death == "exit" else 2  # one SIGKILL makes nobody a suspect
    assert deaths <= first + 1 + math.log2(num_jobs)
    assert worker.terminate(START_SECONDS) == 0

    # the same batch without the poison: the same texts
    without = press.submit([job for i, job in enumerate(jobs) if i != poisoned])
    press.start_workers(1)
    wait_until(lambda: press.num_open() == 0, "all jobs end", 120)
    assert press.texts(without) == press.texts(batch_id)
