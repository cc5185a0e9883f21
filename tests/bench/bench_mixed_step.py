"""Where the time of a *mixed* step goes on a CPU, and how near it comes to its matrix products alone.

`python -m tests.bench.bench_mixed_step [--requests N] [--dtype TYPE] [--quantization int8] [--kv-cache-dtype TYPE]
[--model PATH]`

The mixed workload of `bench_engine` runs once. The operations of every step are timed where they are called, by kind:
products, attention (with the storing of K and V), what else the kernels do (norms, rotary, activation, sampling), and
the rest (planning, inputs, answers, Python). After each step its products, with the weights and row counts that it
had, run once more with nothing in between: that is the ceiling, measured in the same moment, because a machine's
speed changes from minute to minute. A layer in one call is taken apart into its operations for this; the results are
the same. The last line is JSON: shares of the time, tokens per second, and ceiling / whole time.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.linear import Linear
from engine.quantised_linear import Int8Linear
from engine.request import Request, RequestId
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from kernels import Kernels
from tests.bench.bench_engine import Job, bundled_model, mixed

ATTENTION = ("paged_attention", "store_kv", "norm_rope_store")
# Not timed as kernels: products are, with what is around them.
PRODUCTS = ("matmul", "int8_matmul", "int4_matmul", "fp8_matmul")


class Clock:
    """Seconds by kind of operation, and the products of the present step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.products: list[tuple[Linear, int]] = []
        self._quiet = False

    def around(self, kind: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            since = time.perf_counter()
            result = operation(*args, **named)
            self.seconds[kind] += time.perf_counter() - since
            return result

        return timed

    def watch_kernels(self, kernels: Kernels) -> None:
        """The one instance that all parts of a decoder hold: its operations are replaced in place."""
        for one in fields(kernels):
            operation = getattr(kernels, one.name)
            if callable(operation) and one.name not in PRODUCTS:
                kind = "attention" if one.name in ATTENTION else "other kernels"
                object.__setattr__(kernels, one.name, self.around(kind, operation))

    def watch_products(self) -> None:
        for kind in (Linear, Int8Linear):
            kind.__call__ = self._product(kind.__call__)  # type: ignore[method-assign]

    def _product(self, multiply: Callable[[Linear, Tensor], Tensor]) -> Callable[[Linear, Tensor], Tensor]:
        def timed(product: Linear, x: Tensor) -> Tensor:
            since = time.perf_counter()
            result = multiply(product, x)
            if not self._quiet:
                self.seconds["products"] += time.perf_counter() - since
                self.products.append((product, x.shape[0]))
            return result

        return timed

    def repeat_products(self, inputs: dict[int, Tensor]) -> float:
        """Seconds of the step's products alone. `inputs`: some x of each width, with rows enough."""
        self._quiet = True
        since = time.perf_counter()
        for product, rows in self.products:
            product(inputs[product.num_inputs][:rows])
        seconds = time.perf_counter() - since
        self._quiet = False
        self.products.clear()
        return seconds


def request_of(number: int, job: Job) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=job.num_new, ignore_eos=True, seed=number)
    return Request(id=RequestId(str(number), 1), prompt_token_ids=tuple(job.prompt), sampling=sampling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    chosen = {"dtype": args.dtype, "quantization": args.quantization, "kv_cache_dtype": args.kv_cache_dtype}
    path = str(args.model or bundled_model())
    engine = Engine.load(EngineConfig(model=path, device="cpu", enable_prefix_caching=False, **chosen))
    assert isinstance(engine.runner, ModelRunner)
    decoder = engine.runner._decoder
    vocab_size = engine.runner.model_config.vocab_size

    def run(jobs: list[Job], after_step: Callable[[], None]) -> float:
        """Seconds in steps."""
        for number, job in enumerate(jobs):
            engine.add(request_of(number, job))
        seconds = 0.0
        while engine.has_work:
            since = time.perf_counter()
            engine.step()
            seconds += time.perf_counter() - since
            after_step()
        return seconds

    run(mixed(8, args.seed + 1, vocab_size), lambda: None)
    decoder._fused = None
    clock = Clock()
    clock.watch_kernels(decoder.kernels)
    clock.watch_products()
    jobs = mixed(args.requests, args.seed, vocab_size)
    run(jobs[:2], clock.products.clear)
    clock.seconds.clear()
    rows = engine.runner.max_num_batched_tokens + 64
    dtype = getattr(torch, args.dtype)
    inputs = {
        product.num_inputs: torch.randn(rows, product.num_inputs).to(dtype)
        for product in decoder.distinct_products()
    }
    alone = [0.0]

    def repeat() -> None:
        alone[0] += clock.repeat_products(inputs)

    seconds = run(jobs, repeat)
    shares = {kind: spent / seconds for kind, spent in clock.seconds.items()}
    shares["rest"] = 1 - sum(shares.values())
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{kind:15} {share:6.1%}")
    print(f"products alone  {alone[0] / seconds:6.1%} of the whole time")
    result = {
        "workload": "mixed",
        "requests": args.requests,
        **chosen,
        "output_tok_s": round(sum(job.num_new for job in jobs) / seconds, 1),
        "shares": {kind: round(share, 4) for kind, share in shares.items()},
        "ceiling_ratio": round(alone[0] / seconds, 4),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
