"""What is done on the command line while a batch runs and after: watch, follow, retry, bills. Against a real api."""

# ruff: noqa: F811 - fixtures come by import, and their names are those of parameters

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import update

from api import cli_client
from api.cli_client import exit_status
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.database import Database
from jobs.models import Job
from jobs.outcomes import Outcome, record
from tests.api.test_cli import Run, api, complete, database, run  # noqa: F401 - fixtures
from tests.support.processes import Process
from tests.support.tree import ROOT
from tests.support.waiting import wait_until


def batch_of(run: Run, count: int) -> str:
    assert count > 1, "one prompt would be a job without a batch"
    prompts = [argument for i in range(count) for argument in ("--prompt", f"p{i}")]
    return str(run("submit", *prompts).stdout.strip())


def some(database: Database, limit: int, kind: str = "completed") -> None:
    with database.write() as connection:
        claims = claim(connection, worker_id="w", model="tiny", limit=limit)
        outputs = [{"index": 0, "text": "made text", "finish_reason": "stop", "stop_reason": None}]
        error = {"code": "numerics", "message": "NaN logits"}
        outcomes = [
            Outcome(
                job_id=one.job_id,
                fence=one.fence,
                kind=kind,  # type: ignore[arg-type]
                outputs=outputs,
                error=error,
                prompt_tokens=2,
                completion_tokens=3,
            )
            for one in claims
        ]
        record(connection, worker_id="w", outcomes=outcomes)


@pytest.fixture(autouse=True)
def empty_queue(database: Database) -> None:
    complete(database)


def test_exit_statuses() -> None:
    assert exit_status({"completed": 3, "queued": 1}) == 0
    assert exit_status({"failed": 1, "cancelled": 1}) == 1
    assert exit_status({"cancelled": 1, "completed": 1}) == exit_status({"expired": 1}) == 3


def test_watch_until_the_end(run: Run, database: Database) -> None:
    batch_id = batch_of(run, 3)
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(run, "status", batch_id, "--watch", "--interval", "0.05")
        some(database, 2)
        assert not watched.done()
        some(database, 1)
        result = watched.result(30)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{batch_id}  completed  3 jobs: 3 completed\n  tokens: 6 in, 9 out\n"
    assert result.stderr == "", "no bar where there is no terminal"
    job_id = run("submit", "--prompt", "a").stdout.strip()
    Cancels(database).cancel_job(job_id, tenant="default")
    watched_job = run("status", job_id, "--watch", "--json")
    assert (watched_job.exit_code, json.loads(watched_job.stdout)["status"]) == (3, "cancelled")


@pytest.mark.parametrize(("kind", "status"), [("failed", 1), ("cancelled", 3), ("expired", 3)])
def test_how_a_night_may_end(run: Run, database: Database, kind: str, status: int) -> None:
    batch_id = batch_of(run, 2)
    some(database, 1)
    if kind == "failed":
        some(database, 1, "failed")
    elif kind == "cancelled":
        assert run("cancel", batch_id).exit_code == 0
    else:
        with database.write() as connection:
            connection.execute(
                update(Job)
                .where(Job.batch_id == batch_id, Job.state == "queued")
                .values(state="expired", finished_at=Job.created_at)
            )
    assert run("status", batch_id).exit_code == status
    assert run("results", batch_id).exit_code == status
    assert run("results", batch_id, "--order", "completion").exit_code == status


def test_follow_writes_what_ends_and_the_file_when_all_is_there(
    run: Run,
    database: Database,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("of yesterday")
    batch_id = batch_of(run, 4)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(run, "results", batch_id, "--follow", "-o", str(out), "--interval", "0.05")
        some(database, 3)
        wait_until(lambda: list(tmp_path.glob("*.part")), "it has begun")
        assert out.read_text() == "of yesterday"
        some(database, 1, "failed")
        result = following.result(30)
    assert (result.exit_code, result.output) == (1, "")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["completed"] * 3 + ["failed"]
    assert os.listdir(tmp_path) == ["out.jsonl"]
    again = run("results", batch_id, "--follow", "--order", "input")
    assert [json.loads(line)["id"] for line in again.stdout.splitlines()] == sorted(
        line["id"] for line in lines
    )
    assert [json.loads(line) for line in run("results", batch_id, "--follow").stdout.splitlines()] == lines


def test_order_of_completion_without_waiting(run: Run, database: Database) -> None:
    batch_id = batch_of(run, 2)
    some(database, 1)
    now = run("results", batch_id, "--order", "completion", "--json")
    assert (now.exit_code, len(now.stdout.splitlines())) == (0, 1)
    assert "still running" in now.stderr


def test_an_answer_that_breaks_off_leaves_no_file(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = run("results", "batch_unknown", "-o", str(out))
    assert result.exit_code == 1
    assert "there is no batch" in result.stderr
    assert os.listdir(tmp_path) == []
    nowhere = run("results", "batch_unknown", "-o", str(tmp_path / "no" / "such"))
    assert nowhere.exit_code == 1
    assert "no/such" in nowhere.stderr
    assert run("results", "batch_unknown", "-o", "/dev/null").exit_code == 1
    assert Path("/dev/null").is_char_device()


def test_ctrl_c_while_following(run: Run, api: Process, tmp_path: Path) -> None:
    batch_id = batch_of(run, 2)
    url = (api.log.parent / "url").read_text().strip()
    out = tmp_path / "out.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "api.cli", "results", batch_id, "--follow", "-o", str(out), "--url", url],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # wherever the tests run
    ) as process:
        try:
            wait_until(lambda: list(tmp_path.glob("*.part")), "it follows", 30)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
    assert os.listdir(tmp_path) == []
    assert run("status", batch_id).exit_code == 0, "the batch goes on"


def test_who_reads_along_gets_each_line_as_it_ends(run: Run, api: Process, database: Database) -> None:
    batch_id = batch_of(run, 2)
    url = (api.log.parent / "url").read_text().strip()
    command = [sys.executable, "-m", "api.cli", "results", batch_id, "--follow", "--url", url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=api.log.parent) as process:
        try:
            assert process.stdout is not None
            some(database, 1)
            ready, _, _ = select.select([process.stdout], [], [], 30)
            assert ready, "nothing came through the pipe"
            assert json.loads(process.stdout.readline())["status"] == "completed"
            assert process.poll() is None, "the batch is still open"
            some(database, 1)
            assert json.loads(process.stdout.readline())["status"] == "completed"
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_waiting_outlives_a_restart(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_client, "_PAUSE_SECONDS", 0.01)
    failures = [cli_client.Unreachable("away"), cli_client.Refused(503, "not now")]

    def ask() -> str:
        if failures:
            raise failures.pop()
        return "answer"

    assert cli_client.patiently(ask) == "answer"

    def refuse() -> str:
        raise cli_client.Refused(404, "no")

    with pytest.raises(cli_client.Refused):
        cli_client.patiently(refuse)
    monkeypatch.setattr(cli_client, "PATIENCE_SECONDS", 0.0)
    failures.append(cli_client.Unreachable("away"))
    with pytest.raises(cli_client.Unreachable):
        cli_client.patiently(ask)


def test_retry(run: Run, database: Database) -> None:
    batch_id = batch_of(run, 3)
    some(database, 1)
    some(database, 2, "failed")
    made = run("retry", batch_id, "--idempotency-key", "again")
    assert made.exit_code == 0, made.output
    new_id = made.stdout.strip()
    assert new_id.startswith("batch_")
    assert run("retry", batch_id, "--idempotency-key", "again").output == made.output
    assert "2 jobs: 2 queued" in run("status", new_id).output
    some(database, 2)
    assert run("status", new_id, "--watch").exit_code == 0
    nothing = run("retry", new_id, "--json")
    assert nothing.exit_code == 1
    assert "no job of this batch is" in nothing.stderr
    job_id = run("submit", "--prompt", "x").stdout.strip()
    run("cancel", job_id)
    assert run("retry", job_id).exit_code == 1
    again = json.loads(run("retry", job_id, "--state", "cancelled", "--json").output)
    assert again["retry_of"] == job_id


def test_prices_and_the_bill(
    run: Run,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NIGHTPRESS_DATABASE_URL", database.url)
    batch_of(run, 2)
    some(database, 2)
    assert run("usage").output.splitlines()[1].endswith("-"), "no price, no cost"
    given = ("--prompt", "0.10", "--completion", "2.5", "--currency", "EUR")
    made = run("prices", "set", "tiny", *given, "--from", "2020-01-01")
    assert made.exit_code == 0, made.output
    assert made.output.splitlines()[1].split() == ["tiny", "2020-01-01", "00:00", "0.1", "0.1", "2.5", "EUR"]
    late = run("prices", "set", "tiny", *given, "--from", "2020-01-01")
    assert (late.exit_code, "past" in late.stderr) == (1, True)
    wrong = run("prices", "set", "tiny", *given[:-1], "USD")
    assert (wrong.exit_code, "EUR" in wrong.stderr) == (1, True)
    (price,) = json.loads(run("prices", "list", "--json").output)["data"]
    assert (price["valid_from"], price["prompt"], price["cached_prompt"]) == (1577836800.0, "0.1", "0.1")

    told = json.loads(run("usage", "--group-by", "model", "--json").output)["data"]
    (row,) = [row for row in told if row["model"] == "tiny"]
    table = run("usage", "--group-by", "model", "--group-by", "day").output.splitlines()
    assert table[0].split() == [
        "model",
        "day",
        "jobs",
        "prompt",
        "cached",
        "completion",
        "cancelled",
        "wasted",
        "cost",
    ]
    assert table[1].split()[0] == "tiny"
    assert table[1].split()[-2:] == [row["cost"], "EUR"]
    assert row["jobs"] * 2 == row["billed"]["prompt_tokens"]
    refused = run("usage", "--start", "yesterday")
    assert (refused.exit_code, "start" in refused.stderr) == (1, True)
    assert run("usage", "--group-by", "hour").exit_code == 2
    assert run("usage", "--tenant", "*", "--group-by", "tenant").exit_code == 0
    assert run("usage", "--tenant", "nobody").exit_code == 1


def test_a_bar_for_several_batches(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a terminal. Ids still come alone on standard output."""
    monkeypatch.setattr("api.cli_job_file.JOBS_PER_BATCH", 2)
    text = "\n".join(json.dumps({"prompt": "a"}) for _ in range(5))
    made = run("submit", "-", text=text)
    assert made.exit_code == 0
    assert [line[:6] for line in made.stdout.splitlines()] == ["batch_"] * 3
    assert made.stderr == "nightpress: no worker serves tiny now: its jobs wait until one does\n", (
        "once, and no bar"
    )
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with open(slave, "w") as terminal:
        monkeypatch.setattr(cli_client.sys, "stderr", terminal)
        with cli_client.progress("submitted", 5) as bar:
            bar.update(5)
    drawn = ""
    with contextlib.suppress(OSError):  # what ends a terminal whose other side is closed
        while "5/5" not in drawn:
            drawn += os.read(master, 4096).decode()
    os.close(master)
    assert "submitted" in drawn
    assert "5/5" in drawn


def test_a_model_that_nobody_will_serve_again_is_cleared(run: Run, database: Database) -> None:
    """By the operator, for all tenants, so that readiness does not speak of it for ever."""
    made = [run("submit", "--prompt", "a", "--model", "retired").stdout.strip() for _ in range(2)]
    other = run("submit", "--prompt", "a").stdout.strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NIGHTPRESS_DATABASE_URL", database.url)
        assert run("cancel", "--model", "retired").stdout == "retired  2 cancelled\n"
        again = run("cancel", "--model", "retired", "--json")
        assert (again.exit_code, json.loads(again.stdout)) == (0, {})
        assert run("cancel", "--model", "retired").stdout == "retired  no open jobs\n"
        columns = "id, tenant, state, endpoint, total, metadata, created_at, input_file_id"
        with database.write() as connection:  # a file of which no api process reads a line
            connection.exec_driver_sql(
                f"INSERT INTO batches ({columns}, next_offset, model, clerk_until) VALUES "
                "('batch_a', 'default', 'in_progress', '/', 1, '{}', 1, 'file_a', 0, 'retired', 1e12)"
            )
        again = run("cancel", "--model", "retired")
        assert again.stdout == "retired  no open jobs\n"
        assert "1 batch of files still being read" in again.stderr
        with database.write() as connection:
            connection.exec_driver_sql("DELETE FROM batches WHERE id = 'batch_a'")
    assert all("cancelled" in run("status", job_id).output for job_id in made)
    assert "queued" in run("status", other).output
    assert run("cancel", other).exit_code == 0
    for wrong in ((), (other, "--model", "retired")):
        assert (run("cancel", *wrong).exit_code, "--model" in run("cancel", *wrong).output) == (2, True)
