"""What planning costs with a long queue: the scheduler alone, no model, beside plain first come first served.

`python -m tests.bench.bench_planning [--queued N] [--steps N]`

So many requests wait, each on one of 200 templates of 128 to 512 tokens with 16 to 64 of its own; 256 run. Times are
those of `Scheduler.plan` and `Scheduler.settle` per step, in milliseconds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time

from engine.pages import PagePool
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.waiting import Policy


def sequences(count: int) -> list[Sequence]:
    rng = random.Random(0)
    templates = [[rng.randrange(3, 49_000) for _ in range(rng.randint(128, 512))] for _ in range(200)]
    made = []
    for number in range(count):
        own = [rng.randrange(3, 49_000) for _ in range(rng.randint(16, 64))]
        sampling = SamplingParams(seed=number, max_tokens=rng.randint(32, 256))
        request = Request(
            id=RequestId(str(number), 1),
            prompt_token_ids=tuple(rng.choice(templates) + own),
            sampling=sampling,
        )
        made.append(Sequence(request, 0, sampling.max_tokens or 1))
    return made


def measure(policy: Policy, queued: int, steps: int) -> dict[str, float]:
    scheduler = Scheduler(
        PagePool(6000, 16), max_num_seqs=256, max_num_batched_tokens=2048, eos_token_ids=[2], policy=policy
    )
    rng = random.Random(1)
    started = time.perf_counter()
    for sequence in sequences(queued):
        scheduler.add(sequence)
    added = time.perf_counter() - started
    plans, settles = [], []
    for _ in range(steps):
        start = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        tokens = [2 if rng.random() < 0.01 else 7 for _ in plan.sampling_rows]
        drawn = time.perf_counter()
        scheduler.settle(plan, tokens)
        plans.append(1e3 * (planned - start))
        settles.append(1e3 * (time.perf_counter() - drawn))
    assert scheduler.num_waiting > queued // 2, "the queue did not stay long"
    return {
        "add_us": round(1e6 * added / queued, 1),
        "plan_ms_median": round(statistics.median(plans), 3),
        "plan_ms_p99": round(statistics.quantiles(plans, n=100)[98], 3),
        "plan_ms_max": round(max(plans), 2),
        "settle_ms_median": round(statistics.median(settles), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queued", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    result: dict[str, object] = {"queued": args.queued, "steps": args.steps}
    for policy in ("planned", "fcfs"):
        result[policy] = measure(policy, args.queued, args.steps)
        print(f"{policy}: {result[policy]}", flush=True)
    print(json.dumps(result | {"python": platform.python_version()}))


if __name__ == "__main__":
    main()
