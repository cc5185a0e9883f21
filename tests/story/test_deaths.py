"""Parts die in the middle of the work. Every accepted job still ends, with one result."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from jobs.models import Job
from jobs.pool import EXIT_HOPELESS
from jobs.states import JobState
from tests.support.bare_celery import QUEUE, TASK, bare_celery
from tests.support.press import LEASE_SECONDS, SLACK_SECONDS, START_SECONDS, SWEEP_SECONDS, Press
from tests.support.processes import Process
from tests.support.stories import long_jobs, short_jobs
from tests.support.taps import Tap
from tests.support.waiting import wait_until

MOMENT = 0.3  # seconds; well within what these jobs take


def in_mid_generation(press: Press, worker: Process) -> bool:
    """It has held jobs for a moment: at once after the claim they are in the engine, which was idle before."""
    return any(time.time() - job.started_at > MOMENT for job in press.held_by(worker).values())


def test_a_worker_is_killed(press: Press) -> None:
    """Its jobs run again on the other worker within lease + sweep, and a little."""
    workers = press.start_workers(2)
    press.submit(long_jobs(44, 600))  # one worker may hold 48: the other has room for all of them at once
    victim = wait_until(
        lambda: next((worker for worker in workers if in_mid_generation(press, worker)), None),
        "one generates",
        START_SECONDS,
    )
    row = press.worker(victim)
    assert row is not None
    victim.kill()
    killed_at = time.monotonic()
    stranded = press.held_by(victim)
    assert stranded, "it held jobs when it died"

    def run_again() -> bool:
        jobs = press.jobs(Job.id.in_(sorted(stranded)))
        return all(
            jobs[key].fence > job.fence and jobs[key].state != JobState.QUEUED
            for key, job in stranded.items()
        )

    wait_until(run_again, "the dead worker's jobs run again", LEASE_SECONDS + SWEEP_SECONDS + SLACK_SECONDS)
    print(f"{len(stranded)} jobs of a killed worker ran again after {time.monotonic() - killed_at:.1f} s")
    assert press.finish()[JobState.FAILED] == 0
    wait_until(lambda: not alive(row["engine_pid"]), "its engine process has died with it", 5)


def test_an_engine_process_is_killed(press: Press) -> None:
    """The worker stays, starts another engine, and the jobs run again at once."""
    (worker,) = press.start_workers(1)
    press.submit(long_jobs(32, 600))  # half of them run, half wait
    wait_until(lambda: in_mid_generation(press, worker), "it generates", START_SECONDS)
    before = press.worker(worker)
    assert before is not None
    os.kill(before["engine_pid"], signal.SIGKILL)
    assert press.finish()[JobState.FAILED] == 0
    after = press.worker(worker)
    assert after is not None
    assert worker.alive
    assert after["id"] == before["id"], "the same worker, under the same name"
    assert after["engine_starts"] == before["engine_starts"] + 1
    assert after["engine_pid"] != before["engine_pid"]


def test_an_engine_process_is_killed_and_its_jobs_go_on_where_they_were(press: Press, tmp_path: Path) -> None:
    """Only what was made since the last checkpoint is made again, and the texts are those of an undisturbed run."""
    for process in press.live_workers():
        process.terminate(START_SECONDS)
    tap = Tap(tmp_path / "tap")
    worker = press.start("worker", ["worker"], tap.environment)
    jobs = long_jobs(10, 1500)
    jobs[0] |= {"n": 3}
    batch_id = press.submit(jobs)
    wait_until(lambda: len(press.num_saved(batch_id)) == 10, "all have checkpoints", 30)
    row = press.worker(worker)
    assert row is not None
    saved = sum(press.num_saved(batch_id).values())  # at least: more may come before the kill
    os.kill(row["engine_pid"], signal.SIGKILL)
    lost_at_most = tap.num_generated - saved
    assert press.finish()[JobState.FAILED] == 0
    made_again = tap.num_generated - 12 * 1500
    assert 0 <= made_again <= lost_at_most < saved
    undisturbed = press.submit(jobs)
    press.finish()
    assert press.texts(undisturbed) == press.texts(batch_id)


def test_an_engine_process_is_killed_while_a_step_hangs(press: Press) -> None:
    """SIGSTOP stands for a step that never returns: the worker's death must still take the engine along."""
    (worker,) = press.start_workers(1)
    press.submit(long_jobs(4, 1500))
    wait_until(lambda: in_mid_generation(press, worker), "it generates", START_SECONDS)
    row = press.worker(worker)
    assert row is not None
    os.kill(row["engine_pid"], signal.SIGSTOP)
    worker.kill()
    wait_until(lambda: not alive(row["engine_pid"]), "the engine process has died with its worker", 5)
    press.start_workers(1)
    assert press.finish()[JobState.FAILED] == 0


@pytest.mark.long  # ten engines; tests/jobs/test_supervisor.py tells of three that no job meets them
@pytest.mark.parametrize("num_jobs", [1, 20])
def test_a_device_breaks_and_no_job_is_blamed(press: Press, tmp_path: Path, num_jobs: int) -> None:
    """Models still load on it, and every step ends its process. The worker gives up, also when it is started again;
    another one does the work."""
    for process in press.live_workers():
        process.terminate(START_SECONDS)
    tap = Tap(tmp_path / "tap")
    worker = press.start("worker", ["worker"], tap.environment)
    batch_id = press.submit(long_jobs(num_jobs, 600))
    wait_until(lambda: in_mid_generation(press, worker), "it generates", START_SECONDS)
    tap.break_device()
    assert worker.wait(START_SECONDS) == EXIT_HOPELESS
    assert "died while loading, or of its first steps" in worker.text()
    assert press.start("worker", ["worker"], tap.environment).wait(START_SECONDS) == EXIT_HOPELESS
    jobs = press.jobs(Job.batch_id == batch_id).values()
    assert {job.state for job in jobs} <= {JobState.QUEUED, JobState.COMPLETED}
    press.start_workers(1)
    assert press.finish() == {JobState.COMPLETED: num_jobs}


def test_redis_loses_everything(press: Press) -> None:
    """FLUSHALL in mid-run, and again right after a submit, when only the wake-up is lost."""
    (worker,) = press.start_workers(1)
    press.submit(long_jobs(32, 600))
    wait_until(lambda: in_mid_generation(press, worker), "it generates", START_SECONDS)
    press.flush_redis()
    press.submit(short_jobs(20))
    press.flush_redis()
    assert press.finish()[JobState.FAILED] == 0
    with bare_celery(press.redis_url) as app:  # and the Redis door still works
        sent = app.send_task(TASK, kwargs={"prompt": "x", "max_tokens": 2, "ignore_eos": True}, queue=QUEUE)
        assert sent.get(timeout=START_SECONDS)["usage"]["completion_tokens"] == 2
    press.finish()


def alive(pid: int) -> bool:
    """False for a zombie, which is dead and only not yet buried."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
