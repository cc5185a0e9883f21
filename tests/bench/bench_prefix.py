"""Requests of many templates in a pool that holds few of them: planned order beside first come first served.

`python -m tests.bench.bench_prefix [--requests N] [--templates N] [--length N] [--dtype D] [--model PATH]`

400 requests on 20 shuffled templates of 256 tokens, 16 tokens of their own and 32 new ones each, greedy, end of
sequence ignored. The pool holds 4 templates and what 16 sequences own beside them. Both engines share nothing
but the weights' file; each runs the whole work once. The last line is JSON; the ratio is seconds to seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import Checkpoint
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.bench.bench_engine import bundled_model

OWN, NEW, RUNNING = 16, 32, 16


def work(num_requests: int, num_templates: int, length: int) -> list[dict[str, list[int]]]:
    rng = random.Random(4)
    templates = [[rng.randrange(3, 49_000) for _ in range(length)] for _ in range(num_templates)]
    prompts = [
        {"prompt_token_ids": templates[k % num_templates] + [rng.randrange(3, 49_000) for _ in range(OWN)]}
        for k in range(num_requests)
    ]
    rng.shuffle(prompts)
    return prompts


def measure(
    model: str, dtype: Any, policy: Any, prompts: list[dict[str, list[int]]], num_pages: int
) -> dict[str, float]:
    item_bytes = getattr(torch, dtype).itemsize
    page_bytes = 16 * Checkpoint.open(model).config.kv_bytes_per_token(item_bytes)
    llm = LLM(
        model,
        dtype=dtype,
        device="cpu",
        kv_cache_memory_bytes=num_pages * page_bytes,
        scheduling_policy=policy,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [5] * 64}] * 4, sampling, use_tqdm=False)
    before, start = llm.engine.stats(), time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds, stats = time.perf_counter() - start, llm.engine.stats()
    assert all(len(output.outputs[0].token_ids) == NEW for output in outputs)
    return {
        "seconds": round(seconds, 1),
        "output_tok_s": round(len(prompts) * NEW / seconds, 1),
        "computed_tokens": stats["num_computed_tokens"] - before["num_computed_tokens"],
        "cached_prompt_share": round(
            sum(output.num_cached_tokens for output in outputs)
            / sum(len(prompt["prompt_token_ids"]) for prompt in prompts),
            3,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--templates", type=int, default=20)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    model = str(args.model or bundled_model())
    prompts = work(args.requests, args.templates, args.length)
    num_pages = 4 * args.length // 16 + RUNNING * (OWN + NEW) // 16
    result: dict[str, Any] = {"requests": args.requests, "templates": args.templates, "pages": num_pages}
    result["dtype"] = args.dtype
    for policy in ("planned", "fcfs"):
        result[policy] = measure(model, args.dtype, policy, prompts, num_pages)
        print(f"{policy}: {result[policy]}", flush=True)
    result["ratio"] = round(result["fcfs"]["seconds"] / result["planned"]["seconds"], 2)
    result |= {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
