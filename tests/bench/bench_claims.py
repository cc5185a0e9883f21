"""How long a claim takes when a million jobs are queued, on SQLite and on PostgreSQL.

The queue is that of 40 tenants with jobs of all tiers and two models, each job in its fair turn (`jobs.fair_tags`).
Then claims of 64 jobs and of one, each in a transaction of its own that is synced to disk, as a worker makes them. No
job is given back, so the queue's head moves on over the rows that were claimed before. The last line is JSON. Run it
on a machine that does nothing else: `python -m tests.bench.bench_claims`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from jobs.body import JobBody
from jobs.claimer import CLAIM_GROUP
from jobs.claims import claim
from jobs.database import Database
from jobs.job_rows import insert_all, job_row, new_id
from jobs.keys import Scope
from jobs.leases import register
from jobs.settings import Settings
from jobs.tenants import Owner
from jobs.terms import Terms, Tier
from migrations.schema import upgrade
from tests.bench.stores import Start, run, started
from tests.support.clients import key_of

TARGET_MS = 20.0
CHUNK = 10_000
NUM_TENANTS = 40
MODELS = ("small", "large")
TIERS = (Tier.NORMAL, Tier.NORMAL, Tier.NORMAL, Tier.BACKGROUND)


def fill(database: Database, settings: Settings, count: int) -> None:
    for tenant in range(NUM_TENANTS):
        key_of(database, f"tenant-{tenant}", Scope.SUBMIT)
    for start in range(0, count, CHUNK):
        tenant = start // CHUNK % NUM_TENANTS
        tier = TIERS[start // CHUNK // NUM_TENANTS % len(TIERS)]
        rows = [
            job_row(
                new_id("job", i),
                JobBody(model=MODELS[i % len(MODELS)], prompt=f"Write line {i}. " + "x" * 150, max_tokens=64),
                Owner(f"tenant-{tenant}", None),
                settings,
                source="http",
                terms=Terms(tier=tier),
            )
            for i in range(start, min(start + CHUNK, count))
        ]
        database.transact(partial(insert_all, rows=rows))


def claims(database: Database, limit: int, times: int) -> list[float]:
    """Milliseconds of each."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        found = database.transact(partial(claim, worker_id="w", model=MODELS[0], limit=limit))
        taken.append((time.perf_counter() - begun) * 1e3)
        assert len(found) == limit
    return taken


def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    upgrade(url)
    database = Database(url)
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        begun = time.monotonic()
        fill(database, Settings(data_dir=Path(folder), model=MODELS[0]), options.jobs)
        figures: dict[str, Any] = {"fill_seconds": round(time.monotonic() - begun, 1)}
    with database.write() as connection:
        register(connection, worker_id="w", model=MODELS[0], lease_seconds=3600)
    for limit in (CLAIM_GROUP, 1):
        claims(database, limit, 5)
        taken = sorted(claims(database, limit, options.claims))
        figures |= {
            f"claim_{limit}_p50_ms": round(statistics.median(taken), 2),
            f"claim_{limit}_p95_ms": round(taken[int(len(taken) * 0.95)], 2),
            f"claim_{limit}_max_ms": round(taken[-1], 2),
        }
    database.close()
    return figures


def measured(options: argparse.Namespace, start: Start) -> dict[str, Any]:
    with started(start) as (url, _):
        return measure(url, options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--claims", type=int, default=200, help="of each size")
    quick = f"claim_{CLAIM_GROUP}_p50_ms"
    return run(parser, measured, lambda one: bool(one[quick] <= TARGET_MS), f"p50 {TARGET_MS:g} ms")


if __name__ == "__main__":
    sys.exit(main())
