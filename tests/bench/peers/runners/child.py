"""Child: what all runners have in common. One process measures one engine on one workload file and ends.

Owns the arguments, the warm-up, the clock, the check that every request got its tokens, and the line of JSON. Runs in
the virtual environments of the peers, so it may import the standard library and nothing else; a runner, which is
started by its path, finds it beside itself.

The line: `seconds` of the measured call alone, `output_tokens`, `start_up_seconds` from the start of the process
until the engine could take its first request, `cpu_seconds` of this process in the measured call, `dtype`,
`versions`, `notes`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

Generate = Callable[[list[list[int]], list[int]], list[int]]
"""Prompts and numbers of new tokens in, how many each request got out."""


@dataclass(frozen=True)
class Loaded:
    """`dtype`: in which the engine computes, as far as it says. `notes`: what a reader of the figure must know."""

    generate: Generate
    dtype: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Order:
    """What to load. `longest`: tokens of the longest request of the file, prompt and answer."""

    model: str
    dtype: str
    longest: int


def main(load: Callable[[Order], Loaded], packages: Sequence[str]) -> None:
    """Exits with an error, and prints no line, when a request did not get the tokens it asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--started", type=float, default=None, help="monotonic clock at the start of this process"
    )
    args = parser.parse_args()
    started = time.monotonic() if args.started is None else args.started
    workload = json.loads(args.workload.read_text())
    requests, warm_up = (_columns(workload[name]) for name in ("requests", "warm_up"))
    longest = max(len(p) + n for lists in (requests, warm_up) for p, n in zip(*lists, strict=True))

    loaded = load(Order(args.model, args.dtype, longest))
    start_up = time.monotonic() - started
    loaded.generate(*warm_up)

    wall, cpu = time.perf_counter(), time.process_time()
    made = loaded.generate(*requests)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    short = [
        (k, got, want) for k, (got, want) in enumerate(zip(made, requests[1], strict=True)) if got != want
    ]
    if short:
        raise SystemExit(f"request {short[0][0]} got {short[0][1]} tokens instead of {short[0][2]}")
    line = {
        "seconds": seconds,
        "output_tokens": sum(made),
        "start_up_seconds": start_up,
        "cpu_seconds": cpu_seconds,
        "dtype": loaded.dtype,
        "notes": loaded.notes,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
    print("\n" + json.dumps(line), flush=True)


def _columns(jobs: list[dict[str, object]]) -> tuple[list[list[int]], list[int]]:
    return [job["prompt_token_ids"] for job in jobs], [job["max_tokens"] for job in jobs]  # type: ignore[misc]
