"""One night's batch: jobs go in over HTTP and over Redis, and come out of SQL with their usage."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from jobs.models import Job
from jobs.states import JobState
from tests.support.bare_celery import QUEUE, TASK, bare_celery
from tests.support.press import MODEL, Press
from tests.support.stories import long_jobs, short_jobs
from tests.support.waiting import wait_until


def test_200_jobs_run_to_the_end(press: Press) -> None:
    press.start_workers(2)
    jobs = short_jobs(200)
    batch_id = press.submit(jobs)

    wait_until(
        lambda: press.batch(batch_id)["status"] == "completed", "the batch is completed", 90, interval=0.1
    )
    assert press.finish()[JobState.COMPLETED] >= 200

    answer = press.http.get(f"/v1/batches/{batch_id}/results")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["custom_id"] for line in lines] == [job["custom_id"] for job in jobs], "input order"
    usage = press.batch(batch_id)["usage"]
    names = {
        "input_tokens": "prompt_tokens",
        "output_tokens": "completion_tokens",
        "total_tokens": "total_tokens",
    }
    for ours, theirs in names.items():
        assert usage[ours] == sum(line["usage"][theirs] for line in lines) > 0


def test_one_job_and_its_address(press: Press) -> None:
    press.start_workers(1)
    answer = press.http.post("/v1/jobs", json={"prompt": "Hello", "max_tokens": 5, "ignore_eos": True})
    assert answer.status_code == 202
    address = answer.headers["location"]
    press.accepted.add(answer.json()["id"])
    wait_until(lambda: press.http.get(address).json()["status"] == "completed", "the job is completed", 20)
    job = press.http.get(address).json()
    assert job["model"] == MODEL
    assert job["usage"]["completion_tokens"] == 5
    assert len(job["outputs"]) == 1
    press.finish()


def test_a_service_that_only_knows_redis(press: Press) -> None:
    press.start_workers(2)
    kwargs = {"prompt": "Write a line about rain.", "max_tokens": 12, "ignore_eos": True, "seed": 3}
    with bare_celery(press.redis_url) as app:
        for i in range(8):
            app.send_task(TASK, kwargs=kwargs, task_id=f"redis-door-{i}", queue=QUEUE)
        answers = [AsyncResult(f"redis-door-{i}", app=app).get(timeout=30) for i in range(8)]
    press.accepted |= {f"redis-door-{i}" for i in range(8)}
    for answer in answers:
        assert isinstance(answer["text"], str)
        assert answer["text"] == answers[0]["text"], "one seed, one text"
        assert answer["usage"]["completion_tokens"] == 12
        assert answer["usage"]["prompt_tokens"] > 0
    assert press.http.get("/v1/jobs/redis-door-0").json()["outputs"][0]["text"] == answers[0]["text"]
    press.finish()


def test_a_bad_body_from_redis_is_told_to_its_sender(press: Press) -> None:
    press.start_workers(1)
    with bare_celery(press.redis_url) as app:
        sent = app.send_task(TASK, kwargs={"prompt": "x", "max_tokens": -1}, task_id="bad-body", queue=QUEUE)
        with pytest.raises(Exception, match="max_tokens"):
            sent.get(timeout=30)
    job = press.http.get("/v1/jobs/bad-body").json()
    assert job["status"] == "failed"
    assert job["error"]["param"] == "max_tokens"
    press.finish()


def test_duplicates_of_one_message_give_one_result(press: Press) -> None:
    press.start_workers(2)
    kwargs = {"prompt": "Once only.", "max_tokens": 400, "ignore_eos": True}
    ids = [f"duplicate-{i}" for i in range(4)]

    def send(task_id: str) -> None:
        with bare_celery(press.redis_url) as app:
            for _ in range(3):
                app.send_task(TASK, kwargs=kwargs, task_id=task_id, queue=QUEUE)

    with ThreadPoolExecutor(len(ids)) as pool:  # so that both workers receive copies at the same moment
        list(pool.map(send, ids))
    with bare_celery(press.redis_url) as app:
        for task_id in ids:
            assert AsyncResult(task_id, app=app).get(timeout=30)["usage"]["completion_tokens"] == 400
            app.send_task(TASK, kwargs=kwargs, task_id=task_id, queue=QUEUE)  # once more, when it is over
        press.accepted |= set(ids)
        # The last copies have been taken in when a message sent after them is answered.
        app.send_task(TASK, kwargs={"prompt": "x", "max_tokens": 1}, task_id="after", queue=QUEUE).get(
            timeout=30
        )
    press.finish()  # one result and one billed row each
    assert {row.fence for row in press.jobs(Job.id.in_(ids)).values()} == {1}, "run once"


def test_revoke_with_terminate_stops_a_running_job(press: Press) -> None:
    press.start_workers(1)
    job = long_jobs(1, 7000)[0]
    with bare_celery(press.redis_url) as app:
        kwargs = {key: value for key, value in job.items() if key != "custom_id"}
        sent = app.send_task(TASK, kwargs=kwargs, task_id="to-be-revoked", queue=QUEUE)
        wait_until(lambda: sent.state == "STARTED", "Celery says that it has started", 20)
        wait_until(
            lambda: press.jobs(Job.id == "to-be-revoked", Job.state == JobState.IN_PROGRESS), "it runs", 20
        )
        sent.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            sent.get(timeout=20)
    wait_until(
        lambda: press.jobs(Job.id == "to-be-revoked", Job.state == JobState.CANCELLED), "cancelled", 10
    )
    press.finish()


def test_the_front_has_not_loaded_torch(press: Press) -> None:
    """Of the processes that have just done real work; only the engine's may hold torch's libraries."""
    (worker,) = press.start_workers(1)
    press.submit(short_jobs(5))
    press.finish()
    row = press.worker(worker)
    assert row is not None
    for pid, has_torch in ((press.api.pid, False), (worker.pid, False), (row["engine_pid"], True)):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert ("libtorch" in maps) is has_torch
