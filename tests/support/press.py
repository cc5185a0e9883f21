"""Press: a whole running service for a story: servers, one api, some workers, and a client's view of it.

Owns the environment the processes get and what a story needs to do or see: submit, count, find who holds what, kill.
The model is a tiny random Llama, so that a story takes seconds; everything else is the real thing.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import redis
from sqlalchemy import func, select

from jobs.database import Database
from jobs.models import Job, Worker
from jobs.states import TERMINAL, WorkerState
from tests.support.invariants import check_invariants
from tests.support.processes import Process
from tests.support.waiting import wait_until

LEASE_SECONDS = 3.0
RENEW_SECONDS = 1.0
SWEEP_SECONDS = 1.0
START_SECONDS = 60.0  # until a worker is ready: imports of torch and celery on a busy machine
MODEL = "tiny"


class Press:
    def __init__(self, folder: Path, *, database_url: str, redis_url: str, model: Path) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.environment = {
            "NIGHTPRESS_DATA_DIR": str(folder / "data"),
            "NIGHTPRESS_DATABASE_URL": database_url,
            "NIGHTPRESS_REDIS_URL": redis_url,
            "NIGHTPRESS_MODEL": str(model),
            "NIGHTPRESS_MODEL_NAME": MODEL,
            "NIGHTPRESS_LEASE_SECONDS": str(LEASE_SECONDS),
            "NIGHTPRESS_RENEW_SECONDS": str(RENEW_SECONDS),
            "NIGHTPRESS_SWEEP_SECONDS": str(SWEEP_SECONDS),
            "NIGHTPRESS_GRACE_SECONDS": "2",
            "NIGHTPRESS_ENGINE__DEVICE": "cpu",
            "NIGHTPRESS_ENGINE__DTYPE": "float32",
            "NIGHTPRESS_ENGINE__THREADS": "1",
            "NIGHTPRESS_ENGINE__MAX_NUM_SEQS": "16",
            "NIGHTPRESS_ENGINE__KV_CACHE_MEMORY_BYTES": str(64 * 2**20),
        }
        self.database = Database(database_url)
        self.processes: list[Process] = []
        self.accepted: set[str] = set()
        self._serial = itertools.count()
        self.http = httpx.Client(timeout=30)
        self.api: Process

    def open(self) -> None:
        """Start the api. Call `close` also when this fails."""
        self.api = self.start("api", ["api", "--port", "0"])
        self.http.base_url = wait_until(self._address, "the api listens", START_SECONDS)

    # --- processes --------------------------------------------------------------------------------------------

    def start(self, name: str, arguments: list[str], extra: Mapping[str, str] | None = None) -> Process:
        name = f"{name}-{next(self._serial)}"
        process = Process(name, arguments, {**self.environment, **(extra or {})}, self.folder)
        self.processes.append(process)
        return process

    def _address(self) -> str | None:
        assert self.api.alive, self.api.tail()
        found = re.search(r"listening on (http://\S+)", self.api.text())
        return found[1] if found else None

    def start_workers(self, num_workers: int) -> list[Process]:
        """Have exactly so many workers, ready and idle: live ones are kept, others are started."""
        for process in self.live_workers()[num_workers:]:
            process.terminate(START_SECONDS)
        for _ in range(num_workers - len(self.live_workers())):
            self.start("worker", ["worker"])
        for process in self.live_workers():
            wait_until(
                lambda process=process: self._ready(process), f"{process.name} is ready", START_SECONDS
            )
        return self.live_workers()

    def live_workers(self) -> list[Process]:
        return [process for process in self.processes if process.name.startswith("worker") and process.alive]

    def _ready(self, process: Process) -> bool:
        """Its row says so, and no longer tells of what the story before made it do."""
        assert process.alive, process.tail()
        row = self.worker(process)
        return row is not None and row["state"] == WorkerState.READY and row["num_running"] == 0

    def worker(self, process: Process) -> dict[str, Any] | None:
        """The newest row of the workers table with this process's pid."""
        with self.database.read() as connection:
            row = connection.execute(
                select(*Worker.__table__.columns)
                .where(Worker.pid == process.pid)
                .order_by(Worker.started_at.desc())
            ).first()
        return None if row is None else dict(row._mapping)

    def close(self) -> None:
        """Stop everything in good order, then without mercy."""
        for process in self.processes:
            if process.alive:
                process.popen.terminate()
        try:
            for process in self.processes:
                process.wait(30)
        finally:
            for process in self.processes:
                process.destroy()
            self.http.close()
            self.database.close()

    # --- a client's view --------------------------------------------------------------------------------------

    def submit(self, jobs: list[dict[str, Any]]) -> str:
        """POST a batch; its id."""
        answer = self.http.post("/v1/jobs", json={"jobs": jobs})
        assert answer.status_code == 202, answer.text
        batch_id: str = answer.json()["id"]
        self.accepted |= set(self.jobs(Job.batch_id == batch_id))
        return batch_id

    def submit_one(self, job: dict[str, Any]) -> str:
        answer = self.http.post("/v1/jobs", json=job)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        self.accepted.add(job_id)
        return job_id

    def batch(self, batch_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/batches/{batch_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    # --- what SQL says ----------------------------------------------------------------------------------------

    def jobs(self, *conditions: Any) -> dict[str, Any]:
        """Rows by job id."""
        with self.database.read() as connection:
            rows = connection.execute(select(*Job.__table__.columns).where(*conditions)).all()
        return {row.id: row for row in rows}

    def held_by(self, process: Process) -> dict[str, Any]:
        row = self.worker(process)
        return {} if row is None else self.jobs(Job.worker_id == row["id"])

    def num_open(self) -> int:
        with self.database.read() as connection:
            count = connection.scalar(
                select(func.count()).select_from(Job).where(Job.state.not_in(sorted(TERMINAL)))
            )
        return int(count or 0)

    def finish(self, timeout: float = 90.0) -> Counter[str]:
        """Wait until all work has ended, check everything that must hold, count the states."""
        wait_until(lambda: self.num_open() == 0, "all jobs end", timeout, interval=0.1)
        return check_invariants(self.database, self.accepted)

    def flush_redis(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushall()
