"""Two SIGKILLs in the life of one batch: whoever lives goes on, and what was cut off leaves nothing."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import func, select, update

from jobs.database import Database
from jobs.leases import new_worker_id, register
from jobs.models import Batch, Job, Worker
from jobs.states import BatchState, WorkerState
from tests.support.batch_lines import CHAT, chat_line, jsonl
from tests.support.invariants import check_tallies
from tests.support.processes import Process
from tests.support.waiting import wait_until

NUM_LINES = 20_000
MODEL = "asleep"  # known, and nobody runs its jobs

Start = Callable[[], tuple[Process, str]]


@pytest.fixture
def start(database_url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts an api on the same database and folder; the process and its address."""
    processes: list[Process] = []
    environment = {
        "NIGHTPRESS_DATA_DIR": str(tmp_path / "data"),
        "NIGHTPRESS_DATABASE_URL": database_url,
        "NIGHTPRESS_REDIS_URL": f"unix://{tmp_path}/no-redis",  # wake-ups get lost, and nothing else
        "NIGHTPRESS_LEASE_SECONDS": "2",
        "NIGHTPRESS_RENEW_SECONDS": "0.5",
        "NIGHTPRESS_SWEEP_SECONDS": "0.2",
    }

    def start() -> tuple[Process, str]:
        process = Process(f"api-{len(processes)}", ["api", "--port", "0"], environment, tmp_path)
        processes.append(process)

        def address() -> str | None:
            assert process.alive, process.tail()
            found = re.search(r"listening on (http://\S+)", process.text())
            return found[1] if found else None

        return process, wait_until(address, "the api listens", 60)

    yield start
    for process in processes:
        process.destroy()


def batch_of(database: Database) -> Any:
    with database.read() as connection:
        return connection.execute(select(*Batch.__table__.columns)).one()


@pytest.mark.long
def test_a_batch_outlives_the_processes_that_work_on_it(start: Start, database: Database) -> None:
    name = new_worker_id()
    with database.write() as connection:
        register(connection, worker_id=name, model=MODEL, lease_seconds=1)
        connection.execute(update(Worker).values(state=WorkerState.STOPPED))
    process, url = start()
    content = jsonl([chat_line(i, model=MODEL) for i in range(NUM_LINES)])
    form = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", content)}}
    file_id = httpx.post(f"{url}/v1/files", timeout=60, **form).json()["id"]  # type: ignore[arg-type]
    wish = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    batch_id = httpx.post(f"{url}/v1/batches", json=wish, timeout=60).json()["id"]

    wait_until(lambda: batch_of(database).clerk, "a clerk has it", 20, interval=0.002)
    process.kill()
    batch = batch_of(database)
    assert (batch.state, batch.num_inserted) == (BatchState.VALIDATING, 0), "killed while it was checked"

    process, _ = start()
    wait_until(lambda: batch_of(database).num_inserted, "some lines are jobs", 60, interval=0.002)
    process.kill()
    batch = batch_of(database)
    assert 0 < batch.num_inserted < NUM_LINES, "killed while its lines became jobs"
    with database.read() as connection:
        count = connection.scalar(select(func.count()).select_from(Job))
        assert count == batch.num_inserted
        check_tallies(connection)

    process, url = start()
    wait_until(lambda: batch_of(database).next_offset is None, "all lines are jobs", 60)
    with database.read() as connection:
        rows = connection.execute(select(Job.custom_id, Job.position).order_by(Job.position)).all()
        assert [tuple(row) for row in rows] == [(f"line-{i}", i) for i in range(NUM_LINES)]
        check_tallies(connection)
    assert httpx.post(f"{url}/v1/batches/{batch_id}/cancel", timeout=60).status_code == 200
    wait_until(lambda: batch_of(database).state == BatchState.CANCELLED, "it is cancelled", 60)
    shown = httpx.get(f"{url}/v1/batches/{batch_id}", timeout=60).json()
    text = httpx.get(f"{url}/v1/files/{shown['error_file_id']}/content", timeout=60).text
    assert text.count("batch_cancelled") == NUM_LINES


@pytest.mark.long
def test_an_upload_that_a_death_cuts_off_leaves_nothing(start: Start, tmp_path: Path) -> None:
    process, url = start()
    place = urlsplit(url)
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    folder = tmp_path / "data" / "files"
    with socket.create_connection((place.hostname or "", place.port or 0)) as client:
        client.sendall(head.encode() + b"x" * 5_000_000)
        wait_until(
            lambda: folder.exists() and any(path.stat().st_size for path in folder.iterdir()),
            "some of it is on disk",
            20,
        )
        process.kill()
    (left,) = folder.iterdir()
    assert left.suffix == ".part"
    moment = time.time() - 4_000
    os.utime(left, (moment, moment))
    process, url = start()
    assert httpx.get(f"{url}/v1/files").json()["data"] == []
    wait_until(lambda: not list(folder.iterdir()), "it is cleaned up", 20)
