"""Twenty SIGKILLs in one run, of engines and of whole workers: the texts are those of an undisturbed run, and only
what was made since the last checkpoint is made again."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from jobs.models import Checkpoint
from jobs.quarantine import SUSPECT
from jobs.states import JobState
from tests.story.conftest import opened_press
from tests.support.databases import Databases
from tests.support.demo import smollm2
from tests.support.press import CHECKPOINT_SECONDS, SLACK_SECONDS, START_SECONDS, Press
from tests.support.processes import Process
from tests.support.stories import long_jobs
from tests.support.taps import Tap
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long

NUM_KILLS = 20
FINISH_SECONDS = 400.0


def test_twenty_kills(press: Press, tmp_path: Path) -> None:
    for process in press.live_workers():
        process.terminate(START_SECONDS)
    survive(press, Tap(tmp_path / "tap"), num_jobs=40, num_tokens=2500, between=(100, 1400))


@pytest.mark.timeout(900)
def test_twenty_kills_of_a_model_that_writes_sense(
    databases: Databases, tmp_path: Path, given_redis_url: str | None
) -> None:
    # fp32, because a bf16 product takes 10 to 20 times as long without AVX-512
    settings = {
        "NIGHTPRESS_ENGINE__THREADS": "2",
        "NIGHTPRESS_ENGINE__KV_CACHE_MEMORY_BYTES": str(256 * 2**20),
    }
    with (
        databases.fresh("sqlite") as database_url,
        opened_press(tmp_path, database_url, given_redis_url, Path(smollm2()), **settings) as press,
    ):
        press.begin()
        survive(press, Tap(tmp_path / "tap"), num_jobs=4, num_tokens=120, between=(3, 30))


def survive(press: Press, tap: Tap, *, num_jobs: int, num_tokens: int, between: tuple[int, int]) -> None:
    rng = random.Random(6)
    jobs = long_jobs(num_jobs, num_tokens)
    jobs[1] |= {"n": 2, "temperature": 0.9}
    batch_id = press.submit(jobs)
    worker = press.start("worker", ["worker"], tap.environment)
    lost_at_most = 0
    for number in range(NUM_KILLS):
        target = tap.num_generated + rng.randrange(*between)
        wait_until(lambda target=target: tap.num_generated >= target, "it has made some more", 120)
        wait_until(lambda worker=worker: not at_risk(press, worker), "no suspect would be convicted", 120)
        killed_at = time.monotonic()
        if number % 3 == 2:
            worker.kill()
            worker = press.start("worker", ["worker"], tap.environment)
        else:
            os.kill(engine_pid(press, worker), signal.SIGKILL)
        lost_at_most += tap.num_generated_since(killed_at - CHECKPOINT_SECONDS - SLACK_SECONDS)
    assert press.finish(FINISH_SECONDS)[JobState.FAILED] == 0
    made_again = tap.num_generated - (num_jobs + 1) * num_tokens
    assert 0 <= made_again <= lost_at_most
    undisturbed = press.submit(jobs)
    press.finish(FINISH_SECONDS)
    assert press.texts(undisturbed) == press.texts(batch_id)


def at_risk(press: Press, worker: Process) -> bool:
    """Whether a suspect runs that has saved nothing since it was claimed. SIGKILL upon SIGKILL without any progress
    is what a job that needs too much memory looks like: alone in the engine it would rightly be called guilty."""
    held = press.held_by(worker)
    if all(job.crashes < SUSPECT for job in held.values()):
        return False
    query = select(Checkpoint.job_id, Checkpoint.fence).where(Checkpoint.job_id.in_(sorted(held)))
    with press.database.read() as connection:
        saved = connection.execute(query).all()
    return not any(held[row.job_id].fence == row.fence for row in saved)


def engine_pid(press: Press, worker: Process) -> int:
    """Of the engine that runs now: the worker's row may still name the one before."""

    def look() -> int | None:
        row = press.worker(worker)
        pid = row["engine_pid"] if row else None
        return pid if pid and os.path.exists(f"/proc/{pid}/stat") else None

    found = wait_until(look, "the worker's row names its engine", 30)
    assert found is not None
    return found
