"""Parts die in the middle of the work. Every accepted job still ends, with one result."""

from __future__ import annotations

import os
import signal
import time

from jobs.models import Job
from jobs.states import JobState
from tests.support.bare_celery import QUEUE, TASK, bare_celery
from tests.support.press import LEASE_SECONDS, SWEEP_SECONDS, Press
from tests.support.processes import Process
from tests.support.stories import long_jobs, short_jobs
from tests.support.waiting import wait_until

MOMENT = 0.3  # seconds; well within what these jobs take


def in_mid_generation(press: Press, worker: Process) -> bool:
    """It has held jobs for a moment: at once after the claim they are in the engine, which was idle before."""
    return any(time.time() - job.started_at > MOMENT for job in press.held_by(worker).values())


def test_a_worker_is_killed(press: Press) -> None:
    """Its jobs run again on the other worker within lease + sweep + 2 s."""
    workers = press.start_workers(2)
    press.submit(long_jobs(64, 1500))
    victim = wait_until(
        lambda: next((worker for worker in workers if in_mid_generation(press, worker)), None),
        "one generates",
        20,
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

    wait_until(run_again, "the dead worker's jobs run again", LEASE_SECONDS + SWEEP_SECONDS + 2)
    print(f"{len(stranded)} jobs of a killed worker ran again after {time.monotonic() - killed_at:.1f} s")
    assert press.finish()[JobState.FAILED] == 0
    wait_until(lambda: not alive(row["engine_pid"]), "its engine process has died with it", 5)


def test_an_engine_process_is_killed(press: Press) -> None:
    """The worker stays, starts another engine, and the jobs run again at once."""
    (worker,) = press.start_workers(1)
    press.submit(long_jobs(40, 1500))
    wait_until(lambda: in_mid_generation(press, worker), "it generates", 20)
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


def test_an_engine_process_is_killed_while_a_step_hangs(press: Press) -> None:
    """SIGSTOP stands for a step that never returns: the worker's death must still take the engine along."""
    (worker,) = press.start_workers(1)
    press.submit(long_jobs(4, 8000))
    wait_until(lambda: in_mid_generation(press, worker), "it generates", 20)
    row = press.worker(worker)
    assert row is not None
    os.kill(row["engine_pid"], signal.SIGSTOP)
    worker.kill()
    wait_until(lambda: not alive(row["engine_pid"]), "the engine process has died with its worker", 5)
    press.start_workers(1)
    assert press.finish()[JobState.FAILED] == 0


def test_redis_loses_everything(press: Press) -> None:
    """FLUSHALL in mid-run, and again right after a submit, when only the wake-up is lost."""
    (worker,) = press.start_workers(1)
    press.submit(long_jobs(30, 2000))
    wait_until(lambda: in_mid_generation(press, worker), "it generates", 20)
    press.flush_redis()
    press.submit(short_jobs(20))
    press.flush_redis()
    assert press.finish()[JobState.FAILED] == 0
    with bare_celery(press.redis_url) as app:  # and the Redis door still works
        sent = app.send_task(TASK, kwargs={"prompt": "x", "max_tokens": 2, "ignore_eos": True}, queue=QUEUE)
        assert sent.get(timeout=30)["usage"]["completion_tokens"] == 2
    press.finish()


def alive(pid: int) -> bool:
    """False for a zombie, which is dead and only not yet buried."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
