"""Press: a whole running service for a story: servers, one api, some workers, and a client's view of it.

Owns the environment the processes get and what a story needs to do or see: submit, count, find who holds what, kill.
The client has an API key, as it would anywhere but on a developer's machine.
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
import pytest
import redis
from openai import OpenAI
from sqlalchemy import func, select

from engine.growth import size_of
from jobs.broker import make_app
from jobs.checkpoints import load
from jobs.database import Database
from jobs.models import Checkpoint, Job, LedgerEntry, Result, Worker
from jobs.settings import Settings
from jobs.states import TERMINAL, WorkerState
from jobs.tenants import DEFAULT
from jobs.wakeups import WakeUps
from tests.support.clients import bearer, key_of
from tests.support.invariants import check_invariants
from tests.support.processes import Process
from tests.support.servers import ValkeyServer
from tests.support.waiting import wait_until

LEASE_SECONDS = 3.0
RENEW_SECONDS = 1.0
SWEEP_SECONDS = 1.0
SLACK_SECONDS = 3.0  # what other tests on the same cores may add to any of these
GRACE_SECONDS = 1.0
# For what a story only waits for, before or after what it is about: imports of torch and celery, work that gets done.
START_SECONDS = 60.0
FINISH_SECONDS = 180.0
CHECKPOINT_SECONDS = 1.0
MODEL = "tiny"


class Press:
    def __init__(self, folder: Path, *, database_url: str, redis_url: str, model: Path) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.redis_server: ValkeyServer | None = None  # behind that address, if it is ours
        self.environment = {
            "NIGHTPRESS_DATA_DIR": str(folder / "data"),
            "NIGHTPRESS_DATABASE_URL": database_url,
            "NIGHTPRESS_REDIS_URL": redis_url,
            "NIGHTPRESS_MODEL": str(model),
            "NIGHTPRESS_MODEL_NAME": MODEL,
            "NIGHTPRESS_LEASE_SECONDS": str(LEASE_SECONDS),
            "NIGHTPRESS_RENEW_SECONDS": str(RENEW_SECONDS),
            "NIGHTPRESS_SWEEP_SECONDS": str(SWEEP_SECONDS),
            "NIGHTPRESS_GRACE_SECONDS": str(GRACE_SECONDS),
            "NIGHTPRESS_CHECKPOINT_SECONDS": str(CHECKPOINT_SECONDS),
            "NIGHTPRESS_ENGINE__DEVICE": "cpu",
            "NIGHTPRESS_ENGINE__DTYPE": "float32",
            "NIGHTPRESS_ENGINE__THREADS": "1",
            "NIGHTPRESS_ENGINE__MAX_NUM_SEQS": "16",
            "NIGHTPRESS_ENGINE__KV_CACHE_MEMORY_BYTES": str(64 * 2**20),
        }
        self.database = Database(database_url)
        self.processes: list[Process] = []
        self.accepted: set[str] = set()
        self.of_earlier_stories: set[str] = set()
        self._serial = itertools.count()
        self.http = httpx.Client(timeout=30)
        self.api: Process

    def open(self) -> None:
        """Start the api. Call `close` also when this fails."""
        self.api = self.start("api", ["api", "--port", "0"])
        self.http.base_url = wait_until(self._address, "the api listens", START_SECONDS)
        self.http.headers.update(bearer(key_of(self.database, DEFAULT)))

    def begin(self) -> None:
        """A story begins: what is in the database now is none of its own."""
        self.of_earlier_stories = set(self.jobs())

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

    def start_workers(self, num_workers: int, *, or_more: bool = False) -> list[Process]:
        """Have exactly so many workers, ready and idle: live ones are kept, others are started."""
        for process in [] if or_more else self.live_workers()[num_workers:]:
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

    def submit(self, jobs: list[dict[str, Any]], **beside: Any) -> str:
        """POST a batch, with what else is to stand beside its jobs; its id."""
        answer = self.http.post("/v1/jobs", json={"jobs": jobs, **beside})
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

    def openai(self, **options: Any) -> OpenAI:
        """The official SDK as anybody uses it; close it."""
        key = self.http.headers["authorization"].removeprefix("Bearer ")
        return OpenAI(base_url=str(self.http.base_url.join("/v1")), api_key=key, **{"timeout": 60} | options)

    # --- what SQL says ----------------------------------------------------------------------------------------

    def jobs(self, *conditions: Any) -> dict[str, Any]:
        """Rows by job id."""
        with self.database.read() as connection:
            rows = connection.execute(select(*Job.__table__.columns).where(*conditions)).all()
        return {row.id: row for row in rows}

    def texts(self, batch_id: str) -> dict[str, list[str]]:
        """custom_id → what its samples say, of all completed jobs of a batch."""
        query = (
            select(Job.custom_id, Result.outputs)
            .join(Result, Result.job_id == Job.id)
            .where(Job.batch_id == batch_id)
        )
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        return {row.custom_id: [output["text"] for output in row.outputs] for row in rows}

    def num_saved(self, batch_id: str) -> dict[str, int]:
        """Tokens in the checkpoint of each of a batch's jobs that has one."""
        ids = list(self.jobs(Job.batch_id == batch_id))
        with self.database.read() as connection:
            weights = connection.scalars(select(Checkpoint.weights).limit(1)).first() or ""
            return {name: size_of(made) for name, made in load(connection, ids, weights).items()}

    def held_by(self, process: Process) -> dict[str, Any]:
        row = self.worker(process)
        return {} if row is None else self.jobs(Job.worker_id == row["id"])

    def num_open(self) -> int:
        with self.database.read() as connection:
            count = connection.scalar(
                select(func.count()).select_from(Job).where(Job.state.not_in(sorted(TERMINAL)))
            )
        return int(count or 0)

    def finish(self, timeout: float = FINISH_SECONDS) -> Counter[str]:
        """Wait until all work has ended, check everything that must hold, count the states of this story's jobs."""
        wait_until(lambda: self.num_open() == 0, "all jobs end", timeout, interval=0.1)
        check_invariants(self.database, self.accepted)
        return Counter(job.state for key, job in self.jobs().items() if key not in self.of_earlier_stories)

    def kill_redis(self) -> None:
        """SIGKILL to the server, if it is ours to kill; `revive_redis` afterwards."""
        if self.redis_server is None:
            pytest.skip("the Redis that was given is not ours to kill")
        self.redis_server.kill()

    def revive_redis(self) -> None:
        if self.redis_server is not None:
            self.redis_server.start()

    def ledger(self) -> list[Any]:
        """The rows of this story's jobs."""
        with self.database.read() as connection:
            rows = connection.execute(select(*LedgerEntry.__table__.columns)).all()
        return [row for row in rows if row.job_id not in self.of_earlier_stories]

    def wake(self) -> None:
        """Tell the workers that there is work, as whoever has committed some does."""
        wake_ups = WakeUps(make_app(Settings(redis_url=self.redis_url, model=MODEL)), self.database)
        wake_ups.wake(MODEL)
        wake_ups.close()

    def flush_redis(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushall()
