"""One request alone, the blocks of its steps as one operation and operation by operation, in alternating pairs.

`python -m tests.bench.bench_blocks [--pairs N] [--prompt N] [--new N] [--dtype bfloat16] [--model PATH]`

Two engines with weights of their own in one process, greedy and without speculation: every step is one row. The last
line is JSON; ratios are medians over the pairs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, RequestId
from engine.resolved_settings import resolve_dtype
from engine.runner import ModelRunner, load_decoder
from engine.sampling_params import SamplingParams
from kernels import Kernels, kernels_for
from tests.bench.bench_engine import bundled_model


def engine(path: str, dtype: str, kernels: Kernels) -> Engine:
    config = EngineConfig(model=path, device="cpu", dtype=dtype, num_speculative_tokens=0)
    checkpoint = Checkpoint.open(path)
    with torch.inference_mode():
        decoder = load_decoder(
            checkpoint, kernels, dtype=resolve_dtype(dtype, checkpoint.config, "cpu"), device="cpu"
        )
    return Engine(ModelRunner.over(decoder, config), None, config)


def rate(one: Engine, prompt: int, new: int) -> float:
    """Tokens per second of a request that has the engine for itself; no run finds another's prefix."""
    number = one.stats()["num_steps"]
    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, seed=0)
    tokens = tuple(100 + (int(number) + i) % 1000 for i in range(prompt))
    begin = time.perf_counter()
    one.add(Request(id=RequestId(f"{number}", 1), prompt_token_ids=tokens, sampling=sampling))
    while one.has_work:
        one.step()
    return new / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    path = str(args.model or bundled_model())
    own = replace(kernels_for("cpu", "cpu"), multiplies=(torch.bfloat16, torch.float32))
    together, apart = engine(path, args.dtype, own), engine(path, args.dtype, replace(own, fuse=None))
    for one in (together, apart):
        rate(one, args.prompt, 8)

    pairs: list[tuple[float, float]] = []
    for number in range(1, args.pairs + 1):
        first, second = (together, apart) if number % 2 else (apart, together)
        rates = {one: rate(one, args.prompt, args.new) for one in (first, second)}
        pairs.append((rates[together], rates[apart]))
        print("pair {}: one operation {:.1f}, many {:.1f} tok/s".format(number, *pairs[-1]), flush=True)
    result = {
        "dtype": args.dtype,
        "pairs": args.pairs,
        "together_tokens_per_second": round(statistics.median(a for a, _ in pairs), 1),
        "apart_tokens_per_second": round(statistics.median(b for _, b in pairs), 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
