"""Embedded mode: one command up, one signal down, nothing left, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import httpx
import pytest

from jobs.body import JobBody
from jobs.database import Database
from jobs.intake import Intake
from jobs.leases import register
from jobs.settings import Settings
from jobs.tenants import OPERATOR
from migrations.schema import upgrade
from tests.support import rows
from tests.support.processes import Process
from tests.support.tiny import write_tiny_llama
from tests.support.waiting import wait_until

SECONDS = 90.0
ENVIRONMENT = {
    "NIGHTPRESS_ENGINE__DEVICE": "cpu",
    "NIGHTPRESS_ENGINE__DTYPE": "float32",
    "NIGHTPRESS_ENGINE__THREADS": "1",
    "NIGHTPRESS_ENGINE__KV_CACHE_MEMORY_BYTES": str(16 * 2**20),
    "NIGHTPRESS_GRACE_SECONDS": "5",
}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Starts it, and returns when it is ready."""
    processes: list[Process] = []

    def start() -> Process:
        write_tiny_llama(tmp_path / "tiny", max_position=16_384)
        place = ("--port", "0", "--data-dir", str(tmp_path / "d"))
        process = Process("up", ["up", *place, "--model", str(tmp_path / "tiny")], ENVIRONMENT, tmp_path)
        processes.append(process)
        wait_until(lambda: "\nready\n" in process.text() or not process.alive, "up is ready", SECONDS)
        assert process.alive, process.tail()
        return process

    yield start
    for process in processes:
        process.destroy()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """Of the data directory, before `up` comes to it."""
    (tmp_path / "d").mkdir()
    url = f"sqlite:///{tmp_path / 'd' / 'nightpress.sqlite3'}"
    upgrade(url)
    with closing(Database(url)) as database:
        yield database


@pytest.fixture
def up(start: Callable[[], Process]) -> Process:
    return start()


def tree(pid: int) -> dict[int, str]:
    """Every descendant of a process, with its command line."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\x00", " ")
            found |= tree(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def call(folder: Path, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    url = (folder / "d" / "url").read_text().strip()
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return dict(json.load(answer))


def generate(folder: Path) -> None:
    job_id = call(folder, "/v1/jobs", {"prompt": "a", "max_tokens": 4, "ignore_eos": True})["id"]
    done = wait_until(
        lambda: next((j for j in [call(folder, f"/v1/jobs/{job_id}")] if j["status"] == "completed"), None),
        "the job completes",
        SECONDS,
    )
    assert done["usage"]["completion_tokens"] == 4


def test_up_is_ready_though_jobs_of_another_model_wait(
    database: Database, start: Callable[[], Process], tmp_path: Path
) -> None:
    """Left behind by an `up` of another day."""
    with database.write() as connection:
        register(connection, worker_id="gone", model="other", lease_seconds=-1)
    Intake(database, Settings(data_dir=tmp_path / "d")).accept_one(
        JobBody(prompt="a", model="other"), OPERATOR
    )
    start()
    generate(tmp_path)
    with pytest.raises(HTTPError) as refused:
        call(tmp_path, "/ready")
    with closing(refused.value) as answer:
        assert answer.code == 503
        assert json.load(answer)["error"]["message"].startswith("other: jobs are waiting")


def test_the_api_of_up_knows_its_model_without_its_worker(
    database: Database, start: Callable[[], Process], tmp_path: Path
) -> None:
    """From rows of workers it could not tell which is meant; before ours had one, it could tell nothing."""
    with database.write() as connection:
        register(connection, worker_id="elsewhere", model="other", lease_seconds=3600)
    start()
    assert call(tmp_path, "/v1/jobs", {"prompt": "a"})["model"] == "tiny"


def test_up_works_survives_its_worker_and_stops_cleanly(up: Process, tmp_path: Path) -> None:
    generate(tmp_path)
    children = tree(up.pid)
    assert len(children) == 4, children  # broker, worker, engine, api
    second = Process("second", ["up", "--data-dir", str(tmp_path / "d"), "--model", "x"], {}, tmp_path)
    assert second.wait(SECONDS) == 1
    assert "already running" in second.text()
    (worker,) = (pid for pid, command in children.items() if " worker " in command)
    (engine,) = (pid for pid, command in children.items() if "engine.process" in command)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not alive(engine), "the engine dies with its worker", 10)
    generate(tmp_path)
    children = tree(up.pid)
    up.signal(signal.SIGINT)
    assert up.wait(SECONDS) == 0, up.tail()
    assert not [command for pid, command in children.items() if alive(pid)]
    assert not (tmp_path / "d" / "url").exists()
    assert "Traceback" not in up.text()


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.long), True])
def test_who_waits_is_told_when_up_is_stopped(up: Process, tmp_path: Path, stream: bool) -> None:
    """In the error envelope, and what nobody will fetch does not run at the next start."""
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 16_000, "ignore_eos": True}
    answers: list[httpx.Response] = []

    def ask() -> None:
        url = (tmp_path / "d" / "url").read_text().strip() + "/v1/chat/completions"
        answers.append(httpx.post(url, json=body | {"stream": stream}, timeout=SECONDS, trust_env=False))

    client = threading.Thread(target=ask)
    client.start()
    wait_until(lambda: call(tmp_path, "/v1/jobs")["data"], "the job is there", SECONDS)
    up.signal(signal.SIGTERM)
    assert up.wait(SECONDS) == 0, up.tail()
    client.join()
    (answer,) = answers
    begun = answer.status_code == 200  # a stream that had no word yet is refused like the others
    told = json.loads(answer.text.split("\n\n")[-2].removeprefix("data: ")) if begun else answer.json()
    assert told["error"]["code"] == "shutting_down"
    assert answer.status_code == 503 or (stream and begun)
    with closing(Database(f"sqlite:///{tmp_path / 'd' / 'nightpress.sqlite3'}")) as database:
        assert list(rows.jobs_by_state(database)) == ["cancelled"]
    assert "Traceback" not in up.text()


def test_nothing_outlives_an_up_that_is_killed(up: Process) -> None:
    children = tree(up.pid)
    assert len(children) == 4, children
    up.kill()
    wait_until(lambda: not any(alive(pid) for pid in children), "all children end", 10)


def test_a_model_that_cannot_be_served_ends_up(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()  # a folder without a model; a path that leads nowhere is refused at once
    arguments = ["up", "--port", "0", "--data-dir", str(tmp_path / "d"), "--model", str(tmp_path / "none")]
    process = Process("up", arguments, ENVIRONMENT, tmp_path)
    assert process.wait(SECONDS) == 1
    assert "the worker cannot start" in process.text()
