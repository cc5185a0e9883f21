"""Sampling on a CPU: our C, beside the reference set and the library's way, transformers' warpers and a multinomial
draw, in turn.

`python -m tests.bench.bench_sampling [--rounds N] [--vocab N] [--rows N ...]`

Logits are bf16, as of a language model: a few tokens hold most of the weight. Medians over the rounds, in
milliseconds of one call; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels import Filters, kernels_for
from tests.bench.turns import medians

TEMPERATURE = 0.8
ASKED = {  # top_k, top_p, min_p
    "plain": (0, 1.0, 0.0),
    "top-p 0.95": (0, 0.95, 0.0),
    "top-k 50, top-p 0.95": (50, 0.95, 0.0),
    "min-p 0.05": (0, 1.0, 0.05),
}
ROWS = [1, 16, 64]
SPREAD = 2.5  # of normal logits: before the temperature half of the weight lies on about one token in 160


def library(top_k: int, top_p: float, min_p: float) -> Callable[[Tensor], Tensor]:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    none = torch.empty(0, dtype=torch.int64)
    return lambda logits: warpers(none, logits.float()).softmax(dim=1).multinomial(1)


def draws(logits: Tensor, asked: tuple[int, float, float]) -> dict[str, Callable[[], Tensor]]:
    rows = torch.arange(len(logits))
    heat = torch.full((len(logits),), TEMPERATURE, dtype=torch.float64)
    top_k, top_p, min_p = asked
    filters = Filters(
        torch.full_like(rows, top_k), torch.full_like(heat, top_p), torch.full_like(heat, min_p)
    )
    narrowed = filters if asked != ASKED["plain"] else None
    ours, reference = (kernels_for("cpu", name).sample for name in ("cpu", "reference"))
    theirs = library(*asked)
    return {
        "ours": lambda: ours(logits, heat, rows, rows, narrowed),
        "reference": lambda: reference(logits, heat, rows, rows, narrowed),
        "library": lambda: theirs(logits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for rows in args.rows:
            logits = (torch.randn(rows, args.vocab) * SPREAD).bfloat16()
            for name, asked in ASKED.items():
                took = medians(draws(logits, asked), args.rounds)
                each = {one: round(seconds * 1e3, 3) for one, seconds in took.items()}
                found[f"{rows} rows, {name}"] = each
                print(f"{rows} rows, {name}: {each}", flush=True)
    result = {
        "bench": "sampling",
        "milliseconds": found,
        "vocab": args.vocab,
        "rounds": args.rounds,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
