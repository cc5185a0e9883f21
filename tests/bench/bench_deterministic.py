"""What deterministic mode costs: the mixed workload with it and without it, in alternating pairs, in CPU seconds.

`python -m tests.bench.bench_deterministic [--rounds N] [--pairs N] [--requests N] [--dtype bfloat16] [--model PATH]`

Two engines on the same weights in one process, loaded anew in every round and in turns in the other order: where
their memory happens to lie makes one of them some percent faster for as long as it lives. The last line is JSON;
ratios are medians over all pairs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from functools import partial
from pathlib import Path

import torch

from engine.llm import LLM
from tests.bench.bench_engine import Run, bundled_model, in_pairs, mixed, run_ours


def measured_round(path: str, args: argparse.Namespace, modes: tuple[bool, bool]) -> list[tuple[Run, Run]]:
    """Pairs of runs with the mode and without it, by engines loaded in the order of `modes`."""
    # no prefix is kept: the second run of the same work must not be shorter
    llms = {
        mode: LLM(path, dtype=args.dtype, device="cpu", deterministic=mode, enable_prefix_caching=False)
        for mode in modes
    }
    vocab_size = llms[True].engine.runner.model_config.vocab_size
    jobs = mixed(args.requests, args.seed, vocab_size)
    for llm in llms.values():
        run_ours(llm, mixed(8, args.seed + 1, vocab_size))
    runs = partial(run_ours, llms[True], jobs), partial(run_ours, llms[False], jobs)
    pairs: list[tuple[Run, Run]] = []
    for pair in in_pairs(runs, args.pairs):
        pairs.append(pair)
        said = (f"{run.cpu_seconds:.1f} CPU s, {run.tokens_per_second:.1f} tok/s" for run in pair)
        print(f"deterministic {next(said)}; free {next(said)}", flush=True)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2, help="of each round")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    path = str(args.model or bundled_model())

    pairs: list[tuple[Run, Run]] = []
    for number in range(args.rounds):
        modes = (True, False) if number % 2 == 0 else (False, True)
        pairs += measured_round(path, args, modes)
    result = {
        "workload": "mixed",
        "dtype": args.dtype,
        "pairs": len(pairs),
        "deterministic_cpu_s": round(statistics.median(a.cpu_seconds for a, _ in pairs), 1),
        "free_cpu_s": round(statistics.median(b.cpu_seconds for _, b in pairs), 1),
        "cpu_ratio": round(statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs), 4),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
