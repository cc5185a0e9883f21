"""The command line against a real api process: what it prints, and its exit status."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import delete, select, update

from api.cli import main
from jobs.claims import claim
from jobs.database import Database
from jobs.leases import register
from jobs.models import Job, Worker
from jobs.outcomes import Outcome, record
from migrations.schema import misfit
from tests.support.databases import Databases
from tests.support.processes import Process
from tests.support.waiting import wait_until

START_SECONDS = 60.0
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def database(databases: Databases) -> Iterator[Database]:
    with databases.fresh("sqlite") as url:
        database = Database(url)
        yield database
        database.close()


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, database: Database, redis_server_url: str
) -> Iterator[Process]:
    """`nightpress api --port 0`; its address is in the file `url` of its folder."""
    folder = tmp_path_factory.mktemp("api")
    environment = {
        "NIGHTPRESS_DATABASE_URL": database.url,
        "NIGHTPRESS_REDIS_URL": redis_server_url,
        "NIGHTPRESS_MODEL": "tiny",
    }
    arguments = ["api", "--port", "0", "--data-dir", str(folder), "--url-file", str(folder / "url")]
    process = Process("api", arguments, environment, folder)
    try:
        wait_until(lambda: (folder / "url").exists() or not process.alive, "the api starts", START_SECONDS)
        yield process
    finally:
        status = process.terminate(START_SECONDS)
        process.destroy()
    assert status == 0, process.tail()
    assert not (folder / "url").exists()


@pytest.fixture
def run(api: Process, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command that finds the api as it would find that of `nightpress up`."""
    monkeypatch.setenv("NIGHTPRESS_DATA_DIR", str(api.log.parent))

    def run(*arguments: str, text: str | None = None) -> Result:
        return CliRunner().invoke(main, arguments, input=text)

    return run


def complete(database: Database, kind: str = "completed") -> None:
    """End every queued job."""
    with database.write() as connection:
        claims = claim(connection, worker_id="w", model="tiny", limit=10_000)
        outputs = [{"index": 0, "text": "made text", "finish_reason": "stop", "stop_reason": None}]
        error = {"code": "numerics", "message": "NaN logits", "param": "temperature"}
        record(
            connection,
            worker_id="w",
            outcomes=[
                Outcome(
                    job_id=one.job_id,
                    fence=one.fence,
                    kind=kind,  # type: ignore[arg-type]
                    outputs=outputs,
                    error=error if kind == "failed" else None,
                    prompt_tokens=2,
                    completion_tokens=3,
                )
                for one in claims
            ],
        )


def test_a_submit_names_its_terms(run: Run, database: Database) -> None:
    deadline = int(time.time()) + 3_600
    terms = ("--deadline", str(deadline), "--priority", "2", "--max-attempts", "3", "--backoff-seconds", "5")
    done = run("submit", "--prompt", "a", "--model", "tiny", "--json", *terms)
    assert done.exit_code == 0, done.output
    job = json.loads(done.stdout)
    assert (job["deadline"], job["priority"], job["tier"]) == (deadline, 2, "normal")
    with database.read() as connection:
        retry = connection.scalars(select(Job.retry).where(Job.id == job["id"])).one()
    assert (retry["max_attempts"], retry["backoff_seconds"]) == (3, 5)
    assert run("cancel", job["id"]).exit_code == 0
    alone = run("submit", "--prompt", "a", "--backoff-seconds", "5")
    assert alone.exit_code == 2
    assert "--max-attempts" in alone.output


def test_a_model_that_nobody_serves_is_said(run: Run) -> None:
    done = run("submit", "--prompt", "a", "--model", "somebody-else")
    assert (done.exit_code, "no worker serves somebody-else" in done.stderr) == (0, True)
    assert run("cancel", done.stdout.strip()).exit_code == 0
    said = run("status", done.stdout.strip()).output
    assert "no worker" not in said, "it has ended"
    waits = run("submit", "--prompt", "a")  # for the model that this api is configured for
    assert "no worker serves tiny now" in waits.stderr
    assert "\n  no worker serves tiny now" in run("status", waits.stdout.strip()).output
    assert run("cancel", waits.stdout.strip()).exit_code == 0
    later = run("submit", "--prompt", "a", "--not-before", str(time.time() + 86_400), "--json")
    assert later.exit_code == 0, later.output
    name = json.loads(later.stdout)["id"]
    assert "\n  not before 20" in run("status", name).output
    assert run("cancel", name).exit_code == 0
    assert "not before" not in run("status", name).output


def test_the_api_says_where_it_listens(api: Process) -> None:
    url = (api.log.parent / "url").read_text().strip()
    assert url.startswith("http://127.0.0.1:")
    assert f"listening on {url}\n" in api.text()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("[::1]:80", 200),
        ("127.9.9.9:1", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("192.168.0.1", 421),
        ("", 421),
    ],
)
def test_only_loopback_names_are_answered(api: Process, host: str, status: int) -> None:
    url = (api.log.parent / "url").read_text().strip()
    answer = httpx.get(f"{url}/health", headers={"host": host}, trust_env=False)
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["param"] == "host"
        assert answer.headers["x-request-id"]


def test_one_prompt(run: Run, database: Database) -> None:
    made = run("submit", "--prompt", "hello", "--max-tokens", "5")
    assert made.exit_code == 0, made.output
    job_id = made.stdout.strip()
    assert job_id.startswith("job_")
    waiting = run("status", job_id)
    assert (waiting.exit_code, waiting.output) == (
        0,
        f"{job_id}  queued  attempts: 0\n  no worker serves tiny now: its jobs wait until one does\n",
    )
    complete(database)
    done = run("status", job_id)
    assert done.exit_code == 0
    assert "made text" in done.output
    assert json.loads(run("status", job_id, "--json").output)["usage"]["total_tokens"] == 5


@pytest.mark.parametrize(
    "text",
    [
        '{"jobs": [{"prompt": "a"}, {"prompt": "b"}]}',
        '[{"prompt": "a"}, {"prompt": "b"}]',
        '{"prompt": "a"}\n\n{"prompt": "b"}\n',
    ],
)
def test_a_batch_in_every_spelling(run: Run, database: Database, tmp_path: Path, text: str) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(text)
    for source, typed in ((str(file), None), ("-", text)):
        made = run("submit", source, text=typed)
        assert made.exit_code == 0, made.output
        batch_id = made.stdout.strip()
        assert batch_id.startswith("batch_")
        assert "2 jobs: 2 queued" in run("status", batch_id).output
        nothing = run("results", batch_id)
        assert (nothing.exit_code, nothing.stdout) == (0, "")
        assert "still running" in nothing.stderr
        complete(database)
        found = run("results", batch_id, "-o", str(tmp_path / "out.jsonl"))
        assert (found.exit_code, found.output) == (0, "")
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [json.loads(line)["outputs"][0]["text"] for line in lines] == ["made text"] * 2
        assert "tokens: 4 in, 6 out" in run("status", batch_id).output


def test_failed_jobs_are_an_exit_status(run: Run, database: Database) -> None:
    job_id = run("submit", "--prompt", "a").stdout.strip()
    batch_id = run("submit", "--prompt", "a", "--prompt", "b").stdout.strip()
    complete(database, kind="failed")
    assert run("status", job_id).exit_code == 1
    assert "numerics: temperature: NaN logits" in run("status", job_id).output
    assert run("status", batch_id).exit_code == 1
    assert run("results", batch_id).exit_code == 1


def test_a_file_with_a_bad_line_is_an_exit_status(run: Run, api: Process) -> None:
    """Checked by a clerk of the running api."""
    url = (api.log.parent / "url").read_text().strip()
    form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", b"{")}}
    wish = {"endpoint": "/v1/completions", "completion_window": "24h"}
    wish["input_file_id"] = httpx.post(f"{url}/v1/files", **form).json()["id"]
    batch_id = httpx.post(f"{url}/v1/batches", json=wish).json()["id"]
    told = wait_until(
        lambda: (found := run("status", batch_id)).exit_code == 1 and found.output, "it fails", START_SECONDS
    )
    assert "failed" in told
    assert "line 1: invalid_json_line: is not valid JSON" in told
    assert run("cancel", batch_id).exit_code == 1


def test_cancel(run: Run) -> None:
    job_id = run("submit", "--prompt", "a").stdout.strip()
    assert run("cancel", job_id).output == f"{job_id}  cancelled\n"
    batch_id = run("submit", "--prompt", "a", "--prompt", "b").stdout.strip()
    assert json.loads(run("cancel", batch_id, "--json").output)["job_counts"]["cancelled"] == 2


@pytest.mark.parametrize(
    ("arguments", "text", "status", "named"),
    [
        (["status", "job_unknown"], None, 1, "there is no job"),
        (["cancel", "batch_unknown"], None, 1, "there is no batch"),
        (["results", "batch_unknown"], None, 1, "there is no batch"),
        (["status", "a/../b?c#d"], None, 1, "there is no"),
        (["submit", "-"], '{"prompt": "a", "temperature": 9}', 1, "temperature"),
        (["submit", "-"], '{"prompt": "a"}\n{"prompt": ', 2, "line 2, column 12: not JSON"),
        (["submit", "--prompt", "a", "--idempotency-key", "a\nb"], None, 2, "printable"),
        (["submit"], None, 2, "--prompt"),
        (["submit", "-", "--prompt", "a"], "{}", 2, "--prompt"),
        (["submit", "-", "--model", "m"], "{}", 2, "--model"),
        (["submit", "/no/such/file"], None, 2, "/no/such/file"),
        (["status", "job_1", "--url", "ftp://x"], None, 2, "http://"),
        (["status", "job_1", "--url", "http://127.0.0.1:1"], None, 1, "cannot be reached"),
        (["status", "job_1", "--url", "http://127.0.0.1:1"], None, 1, "NIGHTPRESS_DATA_DIR"),
        (["status", "job_1", "--url", "http://"], None, 2, "is no address"),
        (["status", "job_1", "--url", "http://a:b"], None, 2, "is no address"),
        (["status", "job_1", "--url", "http://[::1"], None, 2, "is no address"),
        (["results", "job_1"], None, 2, "is a job"),
        (["status"], None, 2, "ID"),
        (["api", "--allow-public"], None, 2, "--allow-public"),
        (["status", "job_1", "--api-key", "sk-1"], None, 2, "is not an API key"),
        (["api", "--port", "70000"], None, 2, "--port"),
        (["up"], None, 2, "--model"),
        (["run-batch", "-i", "/no/such", "-o", "x"], None, 2, "/no/such"),
        (["nonsense"], None, 2, "nonsense"),
    ],
)
def test_mistakes_are_named(
    run: Run, arguments: list[str], text: str | None, status: int, named: str
) -> None:
    result = run(*arguments, text=text)
    assert result.exit_code == status, result.output
    assert named in result.output
    assert "Traceback" not in result.output


def test_the_address_of_openai_clients_will_do(run: Run, api: Process) -> None:
    url = (api.log.parent / "url").read_text().strip()
    for address in (url, f"{url}/", f"{url}/v1", f"{url}/v1/"):
        assert "there is no job 'job_unknown'" in run("status", "job_unknown", "--url", address).output


def test_an_address_of_ipv6_is_found(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTPRESS_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("NIGHTPRESS_HOST", "::1")
    monkeypatch.setenv("NIGHTPRESS_PORT", "1")
    assert "http://[::1]:1 cannot be reached" in run("status", "job_1").output


def test_settings_that_are_wrong_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTPRESS_MAX_N", "0")
    result = run("migrate")
    assert result.exit_code == 2
    assert "NIGHTPRESS_MAX_N" in result.output
    monkeypatch.setenv("NIGHTPRESS_MAX_N", "1")
    monkeypatch.setenv("NIGHTPRESS_ENGINE__DEVICE", "tpu")
    assert "NIGHTPRESS_ENGINE__DEVICE" in run("migrate").output


def test_migrate(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTPRESS_DATABASE_URL", empty_database_url)
    database = Database(empty_database_url)
    for _ in range(2):
        result = CliRunner().invoke(main, ["migrate"])
        assert (result.exit_code, result.output) == (0, "database is up to date\n")
        assert misfit(database) is None
    database.close()


@pytest.mark.parametrize("reason", ["shape", "port", "database"])
def test_an_api_that_cannot_start_says_why(database: Database, tmp_path: Path, reason: str) -> None:
    environment: dict[str, Any] = {"NIGHTPRESS_DATABASE_URL": database.url}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = "0"
        if reason == "shape":
            environment["NIGHTPRESS_DATABASE_URL"] = f"sqlite:///{tmp_path}/empty.sqlite3"
        elif reason == "port":
            port = str(taken.getsockname()[1])
        else:
            environment["NIGHTPRESS_DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/nothing"
        process = Process("api", ["api", "--port", port], environment, tmp_path)
        assert process.wait(START_SECONDS) == 1
    expected = {"shape": "nightpress migrate", "port": f"port {port}", "database": "cannot be reached"}
    assert expected[reason] in process.text()
    assert "Traceback" not in process.text()


def test_a_submit_with_a_name_hands_in_nothing_twice(run: Run) -> None:
    arguments = ("submit", "--prompt", "a", "--prompt", "b", "--idempotency-key", "night 7")
    first, again = run(*arguments), run(*arguments)
    assert first.exit_code == again.exit_code == 0
    assert first.output == again.output
    other = run("submit", "--prompt", "c", "--idempotency-key", "night 7")
    assert other.exit_code != 0
    assert "Idempotency-Key" in other.output


def test_schedules_from_first_to_last(run: Run, database: Database, tmp_path: Path) -> None:
    lines = tmp_path / "night.jsonl"
    lines.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    made = run(
        "schedule", "create", "nightly", str(lines), "--cron", "30 1 * * *", "--time-zone", "Europe/Berlin"
    )
    assert made.exit_code == 0, made.output
    schedule_id = made.stdout.strip()
    paused = run(
        "schedule", "create", "single", "-", "--cron", "0 4 * * *", "--paused", text='{"prompt": "x"}'
    )
    assert paused.exit_code == 0, paused.output
    listed = run("schedule", "list").stdout.splitlines()
    assert listed[0].startswith(f"{paused.stdout.strip()}  single  0 4 * * *  UTC  1 jobs  paused")
    assert listed[1].startswith(f"{schedule_id}  nightly  30 1 * * *  Europe/Berlin  2 jobs  next 2")
    shown = json.loads(run("schedule", "show", "nightly", "--json").stdout)
    assert shown["jobs"] == [{"prompt": "one"}, {"prompt": "two"}]
    assert json.loads(run("schedule", "list", "--json").stdout)["data"][1] == shown | {"jobs": None}
    assert "paused" in run("schedule", "pause", "nightly").stdout
    assert "paused" in run("schedule", "show", schedule_id).stdout
    assert "next 2" in run("schedule", "resume", schedule_id).stdout
    batch_id = run("schedule", "run", "nightly").stdout.strip()
    assert "2 jobs: 2 queued" in run("status", batch_id).stdout
    complete(database)
    (line,) = run("schedule", "runs", "nightly").stdout.splitlines()
    assert line.endswith(f"  manual  {batch_id}")
    assert run("schedule", "delete", "nightly").stdout == f"{schedule_id}  deleted\n"
    assert run("schedule", "runs", schedule_id).stdout.splitlines() == [line]
    gone = run("schedule", "run", "nightly")
    assert (gone.exit_code, gone.stderr) == (1, "nightpress: there is no schedule 'nightly'\n")
    bad = run("schedule", "create", "bad", str(lines), "--cron", "x", "--time-zone", "UTC")
    assert bad.exit_code == 1
    assert "cron: must be five fields" in bad.stderr
    many = run("schedule", "create", "many", "-", "--cron", "0 4 * * *", text='{"prompt": "x"}\n' * 10_001)
    assert many.exit_code == 2
    assert "more jobs than one batch takes" in many.stderr


def test_status_says_when(run: Run, database: Database) -> None:
    job = {"prompt": "a", "max_tokens": 50}
    batch_id = run("submit", "-", text=json.dumps({"jobs": [job, job]})).stdout.strip()
    assert "done at" not in run("status", batch_id).stdout
    pace = {
        "tokens_per_second": 9.0,
        "steps_per_second": 1.0,
        "computed_tokens": 1.0,
        "estimated_tokens": 1.0,
    }
    with database.write() as connection:
        register(connection, worker_id="measured", model="tiny", lease_seconds=600)
        connection.execute(update(Worker).where(Worker.id == "measured").values(pace=pace))

    def status() -> str:
        return run("status", batch_id).stdout

    wait_until(lambda: "done at about 2" in status(), "the api looks at its workers again")
    complete(database)
    assert "done at" not in status()
    with database.write() as connection:
        connection.execute(delete(Worker).where(Worker.id == "measured"))
