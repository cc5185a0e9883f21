"""How many jobs a second one worker moves when its engine computes nothing: claims, encoding, frames, commits.

A worker process with its engine process, whose every token is the end of sequence (`tests/bench/noop`); all jobs are
queued before it starts. Counted from the first claim to the last commit, on the database's clock. Every commit is
synced to disk, on SQLite and on PostgreSQL. The last line is JSON. Run it on a machine that does nothing else:
`python -m tests.bench.bench_noop`.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import func, select

from jobs.body import JobBody
from jobs.database import Database
from jobs.job_rows import insert_all, job_row, new_id
from jobs.models import Job, Result
from jobs.settings import Settings
from jobs.states import JobState
from jobs.tenants import OPERATOR
from migrations.schema import upgrade
from tests.bench.stores import Start, run, started
from tests.support.processes import Process
from tests.support.servers import ValkeyServer
from tests.support.tiny import write_tiny_llama
from tests.support.tree import ROOT
from tests.support.waiting import wait_until

TARGET = 2_000
CHUNK = 10_000
MODEL = "tiny"


def fill(database: Database, settings: Settings, count: int) -> None:
    for start in range(0, count, CHUNK):
        rows = [
            job_row(
                new_id("job", i),
                JobBody(model=MODEL, prompt=f"Write line {i}. " + "x" * 150, max_tokens=64),
                OPERATOR,
                settings,
                source="http",
            )
            for i in range(start, min(start + CHUNK, count))
        ]
        database.transact(partial(insert_all, rows=rows))


def measure(url: str, folder: Path, count: int) -> dict[str, Any]:
    upgrade(url)
    database, valkey = Database(url), ValkeyServer()
    fill(database, Settings(data_dir=folder, model=MODEL), count)
    environment = {
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parent / 'noop'}",
        "NIGHTPRESS_DATA_DIR": str(folder),
        "NIGHTPRESS_DATABASE_URL": url,
        "NIGHTPRESS_REDIS_URL": valkey.url,
        "NIGHTPRESS_MODEL": str(write_tiny_llama(folder / "model", max_position=1024)),
        "NIGHTPRESS_MODEL_NAME": MODEL,
        "NIGHTPRESS_LOG_LEVEL": "warning",
        "NIGHTPRESS_ENGINE__DEVICE": "cpu",
        "NIGHTPRESS_ENGINE__DTYPE": "float32",
        "NIGHTPRESS_ENGINE__THREADS": "1",
        "NIGHTPRESS_ENGINE__KV_CACHE_MEMORY_BYTES": str(64 * 2**20),
    }
    worker = Process("worker", ["worker"], environment, folder)
    try:

        def done() -> bool:
            assert worker.alive, worker.tail()
            with database.read() as connection:  # a look at every job would cost as much as some hundred jobs
                return connection.scalar(select(func.count()).select_from(Result)) == count

        wait_until(done, "every job is done", 600, interval=0.25)
        processes = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
        cpu = {" ".join(one.cmdline())[-20:]: sum(one.cpu_times()[:2]) for one in processes}
        with database.read() as connection:
            first, last = connection.execute(
                select(func.min(Job.started_at), func.max(Job.finished_at))
            ).one()
            assert set(connection.scalars(select(Job.state).distinct())) == {JobState.COMPLETED}
    finally:
        worker.terminate(60)
        worker.destroy()
        valkey.stop()
        database.close()
    return {
        "jobs_per_second": round(count / (last - first)),
        "seconds": round(last - first, 2),
        "cpu_seconds_worker_and_engine": [round(one, 2) for one in cpu.values()],
    }


def measured(options: argparse.Namespace, start: Start) -> dict[str, Any]:
    with started(start) as (url, folder):
        return measure(url, folder, options.jobs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000)
    return run(parser, measured, lambda one: bool(one["jobs_per_second"] >= TARGET), f"{TARGET} jobs/s")


if __name__ == "__main__":
    sys.exit(main())
