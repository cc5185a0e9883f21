"""One night's batch: jobs go in over HTTP and over Redis, and come out of SQL with their usage."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from jobs.models import Job
from jobs.states import JobState
from tests.support.bare_celery import QUEUE, TASK, bare_celery
from tests.support.clients import bearer, key_of
from tests.support.press import FINISH_SECONDS, MODEL, START_SECONDS, Press
from tests.support.stories import long_jobs, short_jobs
from tests.support.waiting import wait_until


def test_200_jobs_run_to_the_end(press: Press) -> None:
    press.start_workers(2)
    jobs = short_jobs(200)
    batch_id = press.submit(jobs)

    wait_until(
        lambda: press.batch(batch_id)["status"] == "completed",
        "the batch is completed",
        FINISH_SECONDS,
        interval=0.1,
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
    press.start_workers(1, or_more=True)
    asked = {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True, "logprobs": True, "top_logprobs": 2}
    answer = press.http.post("/v1/jobs", json=asked)
    assert answer.status_code == 202
    address = answer.headers["location"]
    press.accepted.add(answer.json()["id"])
    wait_until(
        lambda: press.http.get(address).json()["status"] == "completed", "the job is completed", START_SECONDS
    )
    job = press.http.get(address).json()
    assert job["model"] == MODEL
    assert job["usage"]["completion_tokens"] == 5
    (output,) = job["outputs"]
    assert [len(one["top_logprobs"]) for one in output["logprobs"]["content"]] == [2] * 5
    press.finish()


def test_a_job_whose_answer_has_a_form(press: Press) -> None:
    press.start_workers(1)
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", None]}}, "required": ["mood"]}
    schema |= {"additionalProperties": False}
    named = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema, "strict": True}}
    # White space is allowed between JSON's tokens, and random weights like it: these are the ids of its characters.
    wish = {
        "prompt": "How?",
        "max_tokens": 60,
        "logit_bias": dict.fromkeys(("200", "201", "204", "223"), -100),
    }
    answer = press.http.post("/v1/jobs", json=wish | {"response_format": named})
    assert answer.status_code == 202
    press.accepted.add(answer.json()["id"])
    job = wait_until(
        lambda: (job := press.http.get(answer.headers["location"]).json())["status"] == "completed" and job,
        "the job is completed",
        20,
    )
    assert json.loads(job["outputs"][0]["text"]) in ({"mood": "good"}, {"mood": None})
    assert job["outputs"][0]["finish_reason"] == "stop"
    refused = press.http.post("/v1/jobs", json=wish | {"response_format": {"type": "json_schema"}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format.json_schema"
    press.finish()


def test_two_tenants_share_the_engine_and_nothing_else(press: Press) -> None:
    """Not even the time that a known prefix saves: what one tenant computed, another computes again."""
    press.start_workers(1)
    theirs = bearer(key_of(press.database, "other"))
    job = {"prompt": "Nothing of this is shared. " * 30, "max_tokens": 4, "ignore_eos": True, "seed": 1}

    def run(headers: dict[str, str]) -> dict[str, Any]:
        address = press.http.post("/v1/jobs", json=job, headers=headers).headers["location"]
        done = wait_until(
            lambda: next(
                (
                    one
                    for one in [press.http.get(address, headers=headers).json()]
                    if one["status"] == "completed"
                ),
                None,
            ),
            "the job is completed",
            20,
        )
        press.accepted.add(done["id"])
        return dict(done)

    first, again, other = run({}), run({}), run(theirs)
    assert first["outputs"] == again["outputs"] == other["outputs"]
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, again, other)]
    assert cached[1] > 0 == cached[0] == cached[2]
    assert press.http.get(f"/v1/jobs/{other['id']}").status_code == 404
    assert press.http.get(f"/v1/jobs/{first['id']}", headers=theirs).status_code == 404
    press.finish()


def test_a_service_that_only_knows_redis(press: Press) -> None:
    press.start_workers(2)
    kwargs = {"prompt": "Write a line about rain.", "max_tokens": 12, "ignore_eos": True, "seed": 3}
    with bare_celery(press.redis_url) as app:
        for i in range(8):
            app.send_task(TASK, kwargs=kwargs, task_id=f"redis-door-{i}", queue=QUEUE)
        answers = [AsyncResult(f"redis-door-{i}", app=app).get(timeout=START_SECONDS) for i in range(8)]
    press.accepted |= {f"redis-door-{i}" for i in range(8)}
    for answer in answers:
        assert isinstance(answer["text"], str)
        assert answer["text"] == answers[0]["text"], "one seed, one text"
        assert answer["usage"]["completion_tokens"] == 12
        assert answer["usage"]["prompt_tokens"] > 0
    assert press.http.get("/v1/jobs/redis-door-0").json()["outputs"][0]["text"] == answers[0]["text"]
    press.finish()


def test_a_bad_body_from_redis_is_told_to_its_sender(press: Press) -> None:
    press.start_workers(1, or_more=True)
    with bare_celery(press.redis_url) as app:
        sent = app.send_task(TASK, kwargs={"prompt": "x", "max_tokens": -1}, task_id="bad-body", queue=QUEUE)
        with pytest.raises(Exception, match="max_tokens"):
            sent.get(timeout=START_SECONDS)
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
            assert (
                AsyncResult(task_id, app=app).get(timeout=START_SECONDS)["usage"]["completion_tokens"] == 400
            )
            app.send_task(TASK, kwargs=kwargs, task_id=task_id, queue=QUEUE)  # once more, when it is over
        press.accepted |= set(ids)
        # The last copies have been taken in when a message sent after them is answered.
        app.send_task(TASK, kwargs={"prompt": "x", "max_tokens": 1}, task_id="after", queue=QUEUE).get(
            timeout=START_SECONDS
        )
    press.finish()  # one result and one billed row each
    assert {row.fence for row in press.jobs(Job.id.in_(ids)).values()} == {1}, "run once"


def test_revoke_with_terminate_stops_a_running_job(press: Press) -> None:
    press.start_workers(1, or_more=True)
    job = long_jobs(1, 7000)[0]
    with bare_celery(press.redis_url) as app:
        kwargs = {key: value for key, value in job.items() if key != "custom_id"}
        sent = app.send_task(TASK, kwargs=kwargs, task_id="to-be-revoked", queue=QUEUE)
        wait_until(lambda: sent.state == "STARTED", "Celery says that it has started", START_SECONDS)
        wait_until(
            lambda: press.jobs(Job.id == "to-be-revoked", Job.state == JobState.IN_PROGRESS),
            "it runs",
            START_SECONDS,
        )
        sent.revoke(terminate=True)
        with pytest.raises(TaskRevokedError):
            sent.get(timeout=START_SECONDS)
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
