"""After the night: what was billed, what the meters say and what came out are the same numbers."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from jobs.models import Job
from jobs.states import JobState
from tests.support.bare_celery import QUEUE, TASK, bare_celery
from tests.support.clients import bearer, key_of
from tests.support.press import FINISH_SECONDS, MODEL, START_SECONDS, Press
from tests.support.processes import Process
from tests.support.scrape import Samples, samples_of, value_of
from tests.support.stories import long_jobs, short_jobs
from tests.support.waiting import wait_until

TENANT = "bill"
NAMES = {"prompt": "prompt_tokens", "completion": "completion_tokens", "cached": "cached_tokens"}


def metered_worker(press: Press) -> tuple[Process, str]:
    """The only worker, and the address of its metrics."""
    press.start_workers(0)
    worker = press.start("worker", ["worker"], {"NIGHTPRESS_METRICS_PORT": "0"})
    press.start_workers(1)
    found = wait_until(lambda: re.search(r"metrics\.listening .*port=(\d+)", worker.text()), "it listens")
    return worker, f"http://127.0.0.1:{found[1]}/metrics"


def scrape(url: str, **headers: str) -> Samples:
    answer = httpx.get(url, headers=headers, trust_env=False)
    assert answer.status_code == 200, answer.text
    return samples_of(answer.text)


@pytest.mark.long
def test_usage_meters_and_results_agree(press: Press) -> None:
    _, meters = metered_worker(press)
    headers = bearer(key_of(press.database, TENANT))
    jobs = [*short_jobs(24), {"prompt": "word " * 9000, "custom_id": "too long"}, long_jobs(1, 7000)[0]]
    answer = press.http.post("/v1/jobs", json={"jobs": jobs}, headers=headers)
    assert answer.status_code == 202, answer.text
    batch_id = answer.json()["id"]
    ids = {job.custom_id: job.id for job in press.jobs(Job.batch_id == batch_id).values()}
    press.accepted |= set(ids.values())
    url = f"/v1/batches/{batch_id}/results"

    # Follow it, and cancel the long one in the middle.
    wait_until(
        lambda: press.jobs(Job.id == ids["long-0"], Job.started_at.is_not(None)), "it runs", START_SECONDS
    )
    wait_until(lambda: press.num_open() == 1, "only the long one is left", FINISH_SECONDS, interval=0.1)
    press.http.post(f"/v1/jobs/{ids['long-0']}/cancel", headers=headers)
    lines: list[dict[str, Any]] = []
    after, more = "0", True

    def page() -> bool:
        nonlocal after, more
        params = {"order": "completion", "after": after, "limit": "7"}
        answer = press.http.get(url, params=params, headers=headers)
        lines.extend(map(json.loads, answer.text.splitlines()))
        after, more = answer.headers["x-next"], "x-incomplete" in answer.headers
        return not more

    wait_until(page, "the batch closes", FINISH_SECONDS)
    press.finish()
    assert sorted(line["id"] for line in lines) == sorted(ids.values())
    assert lines[-1]["status"] == "cancelled"

    done = [line for line in lines if line["status"] == "completed"]
    assert len(done) == 24
    expected = {
        "prompt": sum(line["usage"]["prompt_tokens"] for line in done),
        "cached": sum(line["usage"]["prompt_tokens_details"]["cached_tokens"] for line in done),
        "completion": sum(line["usage"]["completion_tokens"] for line in done),
    }
    (row,) = press.http.get("/v1/usage?group_by=batch,model", headers=headers).json()["data"]
    assert (row["batch_id"], row["model"], row["jobs"]) == (batch_id, MODEL, 24)
    assert {kind: row["billed"][name] for kind, name in NAMES.items()} == expected
    assert 0 < row["cancelled"]["completion_tokens"] < 7000

    found = wait_until(
        lambda: (
            (now := scrape(meters))
            and value_of(now, "vllm:num_requests_running") == 0
            and value_of(now, "nightpress_jobs_total") == len(jobs)
            and now
        ),
        "the meters are up to date",
    )
    for kind, number in expected.items():
        assert value_of(found, "nightpress_billed_tokens_total", model=MODEL, type=kind) == number
    for state, count in (("completed", 24), ("failed", 1), ("cancelled", 1)):
        assert value_of(found, "nightpress_jobs_total", state=state) == count
    samples = sum(len(line["outputs"]) for line in done)
    reasons = [
        value_of(found, "vllm:request_success_total", finished_reason=one) for one in ("stop", "length")
    ]
    assert sum(reasons) == samples
    made = value_of(found, "vllm:generation_tokens_total", model_name=MODEL)
    # Equal jobs that run side by side are computed once: among the short ones there are some.
    given_out = expected["completion"] + row["cancelled"]["completion_tokens"]
    assert row["cancelled"]["completion_tokens"] < made <= given_out
    assert value_of(found, "vllm:prompt_tokens_total") >= expected["prompt"]
    assert value_of(found, "vllm:kv_cache_usage_perc") == 0
    assert value_of(found, "nightpress_worker_up", model=MODEL) == 1
    assert value_of(found, "nightpress_job_e2e_seconds_count") == len(jobs)

    of_api = scrape(f"{press.http.base_url}/metrics", **headers)
    assert value_of(of_api, "nightpress_queue_depth", model=MODEL) == 0
    assert value_of(of_api, "nightpress_workers", model=MODEL, state="ready") == 1

    # What failed, once more: it fails again, and is a job of its own.
    again = press.http.post(f"/v1/batches/{batch_id}/retry", headers=headers).json()
    press.accepted |= set(press.jobs(Job.batch_id == again["id"]))
    assert (again["retry_of"], again["request_counts"]["total"]) == (batch_id, 1)
    press.finish()
    (job,) = press.jobs(Job.batch_id == again["id"]).values()
    assert (job.retry_of, job.state) == (ids["too long"], JobState.FAILED)


def test_a_sender_over_redis_hears_of_a_cancel_over_http(press: Press) -> None:
    press.start_workers(1, or_more=True)
    with bare_celery(press.redis_url) as app:
        kwargs = {"prompt": "a", "model": "nobody-serves-this", "tenant": "default"}
        sent = app.send_task(TASK, kwargs=kwargs, task_id="cancelled-over-http", queue=QUEUE)
        wait_until(lambda: press.jobs(Job.id == sent.id), "it is in SQL", START_SECONDS)
        press.accepted.add(sent.id)
        assert press.http.post(f"/v1/jobs/{sent.id}/cancel").json()["status"] == "cancelled"
        with pytest.raises(TaskRevokedError):
            AsyncResult(sent.id, app=app).get(timeout=START_SECONDS)
    wait_until(lambda: press.jobs(Job.id == sent.id, Job.told_at.is_not(None)), "it is marked")
    press.finish()
