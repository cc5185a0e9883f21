"""How fast jobs go in: as a file of JSON lines, as arrays of 1,000, and one by one at a fixed rate.

One api process, this client beside it, no worker; jobs of about 200 bytes; what is accepted is synced to disk, on
SQLite and on PostgreSQL (there of a file's chunks of jobs the last one, and with it those before). A file counts from
its first byte to the commit of its last job. Single submits leave at fixed times, whether the earlier ones have come
back or not, and their time counts from then. The last line is JSON. Run it on a machine that does nothing else:
`python -m tests.bench.bench_submit`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import psutil
from sqlalchemy import func, select

from jobs.database import Database
from jobs.models import Batch, Job
from migrations.schema import upgrade
from tests.bench.stores import Start, run, started
from tests.support.processes import Process
from tests.support.servers import ValkeyServer
from tests.support.waiting import wait_until

ARRAY = 1_000
RATE = 100  # single submits per second
NUM_SENDERS = 16  # so many may be on their way
MODEL = "tiny"
BODY_BYTES = 200
TARGETS = {"file_jobs_per_second": 10_000, "array_jobs_per_second": 5_000, "single_p50_ms": 8.0}


def job(number: int) -> dict[str, Any]:
    """About `BODY_BYTES` of JSON."""
    made = {"model": MODEL, "prompt": f"Write line {number}. ", "max_tokens": 64, "temperature": 0.7}
    made["prompt"] += "x" * (BODY_BYTES - len(json.dumps(made)))
    return made


def write_lines(path: Path, count: int) -> None:
    with path.open("w") as file:
        for i in range(count):
            line = {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions", "body": job(i)}
            file.write(json.dumps(line) + "\n")


class Api:
    """One api process on a database of its own."""

    def __init__(self, folder: Path, database_url: str, redis_url: str) -> None:
        upgrade(database_url)
        self.database = Database(database_url)
        environment = {
            "NIGHTPRESS_DATA_DIR": str(folder),
            "NIGHTPRESS_DATABASE_URL": database_url,
            "NIGHTPRESS_REDIS_URL": redis_url,
            "NIGHTPRESS_MODEL_NAME": MODEL,
            "NIGHTPRESS_LOG_LEVEL": "warning",
        }
        self.process = Process("api", ["api", "--port", "0"], environment, folder)
        self.url = wait_until(self._address, "the api listens", 60)
        self.http = httpx.Client(base_url=self.url, timeout=600)

    def _address(self) -> str | None:
        assert self.process.alive, self.process.tail()
        found = re.search(r"listening on (http://\S+)", self.process.text())
        return found[1] if found else None

    def memory(self) -> int:
        """Bytes that are resident."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def count(self) -> int:
        with self.database.read() as connection:
            return int(connection.scalar(select(func.count()).select_from(Job)) or 0)

    def close(self) -> None:
        self.http.close()
        self.process.terminate(30)
        self.process.destroy()
        self.database.close()


def by_file(api: Api, path: Path, count: int) -> dict[str, Any]:
    memory = api.memory()
    started = time.monotonic()
    with path.open("rb") as file:
        answer = api.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", file)})
    assert answer.status_code == 200, answer.text
    uploaded = time.monotonic()
    wish = {
        "input_file_id": answer.json()["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    made = api.http.post("/v1/batches", json=wish)
    assert made.status_code == 200, made.text
    most = memory
    begun = 0.0

    def inserted() -> bool:
        nonlocal most, begun
        most = max(most, api.memory())
        with api.database.read() as connection:
            batch = connection.execute(select(Batch.num_inserted, Batch.in_progress_at, Batch.errors)).one()
        assert not batch.errors, batch.errors
        if batch.in_progress_at and not begun:
            begun = time.monotonic()
        return bool(batch.num_inserted == count)

    wait_until(inserted, "every line is a job", 3_600, interval=0.05)
    ended = time.monotonic()
    assert api.count() == count
    return {
        "file_jobs_per_second": round(count / (ended - started)),
        "file_upload_seconds": round(uploaded - started, 2),
        "file_check_seconds": round(begun - uploaded, 2),
        "file_insert_seconds": round(ended - begun, 2),
        "file_api_growth_mb": round((most - memory) / 1e6, 1),
    }


def by_arrays(api: Api, count: int) -> dict[str, Any]:
    bodies = [
        json.dumps({"jobs": [job(number * ARRAY + i) for i in range(ARRAY)]}).encode()
        for number in range(count)
    ]
    before = api.count()
    started = time.monotonic()
    for body in bodies:
        answer = api.http.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 202, answer.text
    seconds = time.monotonic() - started
    assert api.count() - before == count * ARRAY
    return {"array_jobs_per_second": round(count * ARRAY / seconds)}


def one_by_one(api: Api, count: int) -> dict[str, Any]:
    """Latencies from the moment at which each was due. Senders speak HTTP through the standard library and write
    their jobs beforehand: httpx would take a millisecond of the processors for each, as long as the service does."""
    address = httpx.URL(api.url)
    idle = SimpleQueue[HTTPConnection]()
    for _ in range(NUM_SENDERS):
        idle.put(HTTPConnection(address.host, address.port, timeout=60))
    bodies = [json.dumps(job(number)).encode() for number in range(count)]
    begin = time.monotonic() + 0.2

    def send(number: int) -> float:
        due = begin + number / RATE
        time.sleep(max(0.0, due - time.monotonic()))
        connection = idle.get()
        connection.request("POST", "/v1/jobs", bodies[number], {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 202, text
        idle.put(connection)
        return time.monotonic() - due

    with ThreadPoolExecutor(NUM_SENDERS) as pool:
        seconds = sorted(pool.map(send, range(count)))
    while not idle.empty():
        idle.get().close()
    return {
        "single_p50_ms": round(statistics.median(seconds) * 1e3, 2),
        "single_p99_ms": round(seconds[int(len(seconds) * 0.99)] * 1e3, 2),
        "single_per_second": RATE,
    }


def measure(options: argparse.Namespace, start: Start) -> dict[str, Any]:
    """Each way on a service and a database of its own."""
    figures: dict[str, Any] = {}
    for way in ("file", "arrays", "singles"):
        valkey = ValkeyServer()
        with started(start) as (url, folder):
            api = Api(folder, url, valkey.url)
            try:
                if way == "file":
                    path = folder / "in.jsonl"
                    write_lines(path, options.lines)
                    figures |= by_file(api, path, options.lines)
                elif way == "arrays":
                    figures |= by_arrays(api, options.arrays)
                else:
                    figures |= one_by_one(api, options.singles)
            finally:
                api.close()
                valkey.stop()
    return figures


def meets(figures: dict[str, Any]) -> bool:
    return all(
        figures[name] <= target if name.endswith("_ms") else figures[name] >= target
        for name, target in TARGETS.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=100_000, help="of the file")
    parser.add_argument("--arrays", type=int, default=50, help=f"of {ARRAY} jobs")
    parser.add_argument("--singles", type=int, default=1_000)
    targets = ", ".join(f"{name} {target:g}" for name, target in TARGETS.items())
    return run(parser, measure, meets, targets)


if __name__ == "__main__":
    sys.exit(main())
