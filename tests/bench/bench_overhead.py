"""What the service costs beside its engine: the *mixed* workload through the whole house.

96 jobs (prompts of 16–256 tokens, 16–256 new tokens each, greedy, end of sequence ignored; its own seed) go through
`nightpress up` with SmolLM2: HTTP, SQL, Redis, worker, engine. Printed are the engine's busy share of the time
between the first claim and the last completion (SQL's clock), and the CPU seconds of all other processes beside the
engine's. The last line is JSON. Run it on a machine that does nothing else: `python -m tests.bench.bench_overhead`.
"""

from __future__ import annotations

import json
import platform
import random
import signal
import sqlite3
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support import leaks
from tests.support.demo import served_model, smollm2
from tests.support.processes import Process
from tests.support.waiting import wait_until

NUM_JOBS = 96
SEED = 20_26
RENEW_SECONDS = 1.0  # how soon the engine's counters reach SQL; also the resolution of nothing else
TARGET_BUSY = 0.97
TARGET_CPU = 0.05
WORDS = (
    "the",
    "night",
    "press",
    "page",
    "by",
    "morning",
    "while",
    "a",
    "small",
    "town",
    "under",
    "rain",
    "and",
)


def mixed_jobs() -> list[dict[str, Any]]:
    """Words of one token each, so that a prompt has about as many tokens as words."""
    rng = random.Random(SEED)
    return [
        {
            "prompt": " ".join(rng.choice(WORDS) for _ in range(rng.randint(16, 256))),
            "max_tokens": rng.randint(16, 256),
            "ignore_eos": True,
            "temperature": 0,
        }
        for _ in range(NUM_JOBS)
    ]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


class Counters:
    """CPU seconds of the engine and of all others, and the engine's busy seconds, at one moment."""

    def __init__(self, up: Process, database: sqlite3.Connection) -> None:
        row = database.execute("SELECT engine_pid, stats FROM workers WHERE state = 'ready'").fetchone()
        self.engine_pid, stats = row[0], json.loads(row[1])
        self.stats: dict[str, float] = stats
        root = psutil.Process(up.pid)
        processes = [root, *root.children(recursive=True)]
        self.engine = sum(cpu_seconds(process) for process in processes if process.pid == self.engine_pid)
        self.others = sum(cpu_seconds(process) for process in processes if process.pid != self.engine_pid)


def measure(folder: Path) -> dict[str, Any]:
    environment = {"NIGHTPRESS_RENEW_SECONDS": str(RENEW_SECONDS), "NIGHTPRESS_LOG_LEVEL": "warning"}
    arguments = ["up", "--data-dir", str(folder), "--model", smollm2(), "--port", "0"]
    up = Process("up", arguments, environment, folder)
    try:
        figures = run(up, folder)
        up.signal(signal.SIGINT)
        assert up.wait(40) == 0
        return figures
    except BaseException:
        print(up.tail(), file=sys.stderr)
        raise
    finally:
        up.destroy()


def run(up: Process, folder: Path) -> dict[str, Any]:
    url = folder / "url"
    wait_until(lambda: url.exists() and up.alive, "nightpress up listens", 60)
    with httpx.Client(base_url=url.read_text().strip(), timeout=60) as http:
        served_model(http, up)
        database = sqlite3.connect(f"file:{folder / 'nightpress.sqlite3'}?mode=ro", uri=True)
        settled(up, database, num_generated=None)
        before = Counters(up, database)
        submitted = time.monotonic()
        answer = http.post("/v1/jobs", json={"jobs": mixed_jobs()})
        assert answer.status_code == 202, answer.text
        batch_url = f"/v1/batches/{answer.json()['id']}"
        wait_until(
            lambda: http.get(batch_url).json()["status"] == "completed", "the batch ends", 900, interval=1.0
        )
        wall = time.monotonic() - submitted
        usage = http.get(batch_url).json()["usage"]
        settled(
            up, database, num_generated=before.stats.get("num_generated_tokens", 0) + usage["output_tokens"]
        )
        after = Counters(up, database)
        query = "SELECT count(*), min(started_at), max(finished_at) FROM jobs WHERE state = 'completed'"
        completed, first_claim, last_completion = database.execute(query).fetchone()
        database.close()
    assert completed == NUM_JOBS
    span = last_completion - first_claim
    busy = after.stats["busy_seconds"] - before.stats.get("busy_seconds", 0.0)
    engine, others = after.engine - before.engine, after.others - before.others
    return {
        "busy_share": round(busy / span, 4),
        "cpu_others_over_engine": round(others / engine, 4),
        "busy_seconds": round(busy, 2),
        "span_seconds": round(span, 2),
        "wall_seconds": round(wall, 2),
        "engine_cpu_seconds": round(engine, 2),
        "others_cpu_seconds": round(others, 2),
        "prompt_tokens": usage["input_tokens"],
        "output_tokens": usage["output_tokens"],
        "output_tokens_per_second": round(usage["output_tokens"] / span, 1),
    }


def settled(up: Process, database: sqlite3.Connection, *, num_generated: float | None) -> None:
    """Wait until the workers table shows an idle engine that has made so many tokens (None: any number)."""

    def idle() -> bool:
        assert up.alive, up.tail()
        row = database.execute("SELECT stats FROM workers WHERE state = 'ready'").fetchone()
        stats = json.loads(row[0]) if row else {"num_requests": 1}
        made = stats.get("num_generated_tokens", 0)  # no figures yet: an engine that has not worked
        return not stats.get("num_requests") and (num_generated is None or made >= num_generated)

    wait_until(idle, "the engine's last figures arrive", 30)


def main() -> int:
    leaks.mark_this_run()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as name:
        figures = measure(Path(name))
    busy, cpu = figures["busy_share"], figures["cpu_others_over_engine"]
    print(f"engine busy {busy:.1%} of first claim to last completion (target ≥ {TARGET_BUSY:.0%})")
    print(f"CPU of all other processes {cpu:.1%} of the engine's (target ≤ {TARGET_CPU:.0%})")
    figures |= {
        "num_jobs": NUM_JOBS,
        "passed": busy >= TARGET_BUSY and cpu <= TARGET_CPU,
        "load_before": psutil.getloadavg()[1],
        "cores": psutil.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    print(json.dumps(figures))
    return 0 if figures["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
