"""Several models behind one api: each worker serves one, and every job finds the workers of its model."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from jobs.broker import work_queue
from jobs.models import Job
from jobs.states import JobState
from tests.support.press import FINISH_SECONDS, START_SECONDS, Press
from tests.support.processes import Process
from tests.support.tiny import write_tiny_llama
from tests.support.waiting import wait_until

OTHER = "other"
NUM_JOBS = 40


@pytest.fixture
def other_model(press: Press, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a worker that serves the other model; such workers end with the story."""
    folder = write_tiny_llama(tmp_path / OTHER, seed=7, max_position=512)
    yield {"NIGHTPRESS_MODEL": str(folder), "NIGHTPRESS_MODEL_NAME": OTHER}
    for process in press.processes:
        if process.name.startswith(OTHER) and process.alive:
            process.terminate(START_SECONDS)


def start_other(press: Press, environment: dict[str, str]) -> Process:
    process = press.start(OTHER, ["worker"], environment)
    wait_until(lambda: press._ready(process), "the other worker is ready", START_SECONDS)
    return process


def test_a_worker_that_comes_later_looks_by_itself(press: Press, other_model: dict[str, str]) -> None:
    """Nobody announces work that nobody serves, and nobody is there to announce this."""
    for worker in press.live_workers():
        worker.terminate(START_SECONDS)
    batch_id = press.submit([{"model": "later", "prompt": f"x {i}", "max_tokens": 2} for i in range(3)])
    press.api.signal(signal.SIGSTOP)
    try:
        with redis.Redis.from_url(press.redis_url) as client:
            assert not client.exists(work_queue("later"))
        extra = {"NIGHTPRESS_MODEL_NAME": "later", "NIGHTPRESS_SWEEP_SECONDS": "600"}
        press.start(OTHER, ["worker"], other_model | extra)
        done = (Job.batch_id == batch_id, Job.state == JobState.COMPLETED)
        wait_until(lambda: len(press.jobs(*done)) == 3, "its jobs are done", START_SECONDS)
    finally:
        press.api.signal(signal.SIGCONT)
    press.finish()


@pytest.mark.long
def test_one_batch_for_two_models(press: Press, other_model: dict[str, str]) -> None:
    (worker,) = press.start_workers(1)
    other = start_other(press, other_model)
    listed = {model["id"] for model in press.http.get("/v1/models").json()["data"]}
    assert listed == {"tiny", OTHER}
    jobs = [
        {
            "model": ("tiny", OTHER)[i % 2],
            "prompt": f"Story {i // 2}.",
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "custom_id": f"{i // 2}-{i % 2}",
        }
        for i in range(NUM_JOBS)
    ]
    batch_id = press.submit(jobs)
    assert press.finish()[JobState.COMPLETED] == NUM_JOBS
    assert press.batch(batch_id)["request_counts"] == {"total": NUM_JOBS, "completed": NUM_JOBS, "failed": 0}
    texts = press.texts(batch_id)
    same = [i for i in range(NUM_JOBS // 2) if texts[f"{i}-0"] == texts[f"{i}-1"]]
    assert not same, "the two models do not say the same"

    # Without its worker a job waits, whatever the others have time for, and goes on when one comes back.
    assert other.terminate(START_SECONDS) == 0
    alone = press.submit_one({"model": OTHER, "prompt": "Later.", "max_tokens": 4, "ignore_eos": True})
    press.submit_one({"model": "tiny", "prompt": "Now.", "max_tokens": 4, "ignore_eos": True})
    wait_until(lambda: press.num_open() == 1, "tiny's job is done", FINISH_SECONDS)
    (waiting,) = press.jobs(Job.id == alone).values()
    assert (waiting.state, waiting.worker_id, waiting.fence) == (JobState.QUEUED, None, 0)
    start_other(press, other_model)
    assert press.finish()[JobState.COMPLETED] == NUM_JOBS + 2
    assert worker.alive
