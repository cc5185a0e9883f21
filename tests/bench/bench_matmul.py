"""Products on a CPU: our own in bf16, fp32 and of 8-bit integers, beside the library's on plain weights, in turn.

`python -m tests.bench.bench_matmul [--rounds N] [--shape INxOUT ...] [--rows N ...]`

The shapes are SmolLM2-135M's unless given. A weight fits the last cache, so few rows show what a product costs and
not what memory gives. Medians over the rounds, in GFLOP/s; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import kernels_for
from tests.bench.turns import medians

SHAPES = ["576x960", "576x576", "576x3072", "1536x576"]
ROWS = [1, 4, 16, 96, 256, 1024]
LEAST_FLOPS = 2e8  # of one round of one product


def products(inputs: int, outputs: int, rows: int) -> dict[str, Callable[[], Tensor]]:
    """By name; all of the same numbers."""
    kernels = kernels_for("cpu", "cpu")
    assert kernels.matmul is not None
    assert kernels.pack is not None
    assert kernels.quantise_int8 is not None
    assert kernels.int8_matmul is not None
    matmul, int8_matmul = kernels.matmul, kernels.int8_matmul
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    half_x, half = x.bfloat16(), weight.bfloat16()
    packed, packed_half, integers = kernels.pack(weight), kernels.pack(half), kernels.quantise_int8(weight)
    return {
        "ours bf16": lambda: matmul(half_x, packed_half, None),
        "library bf16": lambda: F.linear(half_x, half),
        "ours fp32": lambda: matmul(x, packed, None),
        "library fp32": lambda: F.linear(x, weight),
        "ours int8": lambda: int8_matmul(half_x, integers, None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for shape in args.shape:
            inputs, outputs = map(int, shape.split("x"))
            for rows in args.rows:
                flops = 2 * inputs * outputs * rows
                made = products(inputs, outputs, rows)
                took = medians(made, args.rounds, max(1, int(LEAST_FLOPS / flops)))
                rates = {name: round(flops / seconds / 1e9, 1) for name, seconds in took.items()}
                found[f"{shape} rows {rows}"] = rates
                print(f"{shape} rows {rows}: {rates}", flush=True)
    result = {
        "bench": "matmul",
        "gflops": found,
        "rounds": args.rounds,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
