"""What it brings on a CPU that rows on one prefix read it together: the attention of a step, with and without.

`python -m tests.bench.bench_attention_cpu [--rows N] [--prefix N] [--own N] [--layers N] [--pairs N] [--threads N]`

SmolLM2-135M's shape: 30 layers, 9 query heads on 3 kv heads of 64 channels. 96 rows of one query each, on 512 tokens
in the same pages and 96 of their own. Every layer has its own cache, as in a step; pages lie in random order. Pairs
alternate, and which of the two comes first alternates as well. The results must be the same, bit for bit. The last
line is JSON, with medians. Times are of the wall: run it on a quiet machine. With other work beside it threads wait
for each other, and `--threads 1` says more.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import Attention, Kernels, PagedKV, SharedPrefixes, kernels_for

HEADS, KV_HEADS, DIM, PAGE_SIZE = 9, 3, 64, 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Step(NamedTuple):
    queries: Tensor  # [R, hq, d]
    layers: list[PagedKV]
    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor
    shared: SharedPrefixes


def random_step(rows: int, prefix: int, own: int, num_layers: int, dtype: torch.dtype) -> Step:
    generator = torch.Generator().manual_seed(0)
    held, each = prefix // PAGE_SIZE, -(-own // PAGE_SIZE)
    num_pages = held + rows * each
    order = torch.randperm(num_pages, generator=generator).int()
    table = torch.cat((order[:held].expand(rows, held), order[held:].view(rows, each)), dim=1)

    def filled(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    layers = [
        PagedKV(filled(num_pages, KV_HEADS, DIM, PAGE_SIZE), filled(num_pages, KV_HEADS, PAGE_SIZE, DIM))
        for _ in range(num_layers)
    ]
    everybody = torch.arange(rows, dtype=torch.int32)
    return Step(
        filled(rows, HEADS, DIM),
        layers,
        table.contiguous(),
        torch.arange(rows + 1, dtype=torch.int32),
        torch.full((rows,), held * PAGE_SIZE + own, dtype=torch.int32),
        SharedPrefixes(
            torch.full((rows,), held * PAGE_SIZE, dtype=torch.int32),
            everybody,
            torch.tensor([0, rows], dtype=torch.int32),
        ),
    )


def attend(kernels: Kernels, step: Step, *, together: bool) -> tuple[float, list[Tensor]]:
    """Milliseconds, and what each layer mixed."""
    how, hint = Attention(DIM**-0.5), step.shared if together else None
    begin = time.perf_counter()
    mixed = [
        kernels.paged_attention(
            step.queries, cache, step.page_table, step.query_start, step.context_lens, how, hint
        )
        for cache in step.layers
    ]
    return (time.perf_counter() - begin) * 1e3, mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--own", type=int, default=96)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernels = kernels_for("cpu", "cpu")
    step = random_step(args.rows, args.prefix, args.own, args.layers, DTYPES[args.dtype])

    wanted = attend(kernels, step, together=False)[1]  # these two also warm up
    found = attend(kernels, step, together=True)[1]
    if not all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True)):
        raise SystemExit("rows that share a prefix got other bits")
    times: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(args.pairs):
        for together in (False, True) if pair % 2 == 0 else (True, False):
            times[together].append(attend(kernels, step, together=together)[0])
        print(f"pair {pair}: alone {times[False][-1]:8.2f} ms, together {times[True][-1]:8.2f} ms")
    ratios = [alone / together for alone, together in zip(times[False], times[True], strict=True)]
    result = {
        "alone_ms": round(statistics.median(times[False]), 2),
        "together_ms": round(statistics.median(times[True]), 2),
        "ratio": round(statistics.median(ratios), 3),
        **vars(args),
        "kernels": kernels.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
