"""What 8 bits cost in exactness: an int8 KV cache, which brings room, and products of int8, against bf16.

`python -m tests.bench.bench_int8 [--prompts N] [--tokens N] [--model PATH]`

32 chat prompts of real text, up to 64 greedy tokens each, ended by the end of the turn; bf16 on the CPU. The
run with all in bf16 is the yardstick. Measured for each other run:

(a) teacher-forced agreement: the yardstick's tokens are forced on the run; share of all positions at which
    its own argmax is that token.
(b) |logprob difference| of those forced tokens between the run and the yardstick: mean and largest, in nats.
(c) common prefix: the run generates freely; mean number of tokens until it first differs from the yardstick.
(d) capacity: tokens that 1 GiB of pages hold, scales included, and the ratio to bf16.

Beside them stands bf16 again, computed by the reference kernels: it differs by rounding alone, and
shows how much of (a) to (c) any change of rounding costs. The last line is JSON. Nothing here measures speed.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.memory import fitting_pages
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from tests.bench.bench_engine import bundled_model
from tests.support.demo_jobs import ARTICLES, PRODUCTS
from tests.support.rollout import page_order, plan_for, sequence

CAPACITY_BYTES = 2**30
CACHES = {"bf16": torch.bfloat16, "int8": torch.int8}


class Run(NamedTuple):
    """Per prompt: what was chosen at each position, and the log-probability of the token that was read next."""

    chosen: list[list[int]]
    logprobs: list[list[float]]


def chats() -> list[str]:
    """32 requests of 10 to 90 words."""
    return [
        *(f"Write a short product description for {text}." for _, text in PRODUCTS),
        *(f"Summarize this text in one sentence:\n\n{text}" for text in ARTICLES),
        *(f"Write a short headline for this article:\n\n{text}" for text in ARTICLES),
        *(f"Write a reader's letter in answer to this article:\n\n{text}" for text in ARTICLES),
    ]


def load(path: Path, **settings: Any) -> ModelRunner:
    config = EngineConfig(
        model=str(path), dtype="bfloat16", device="cpu", max_num_seqs=64, max_model_len=1024, **settings
    )
    return ModelRunner.load(config, Checkpoint.open(str(path)))


def greedy(
    runner: ModelRunner,
    prompts: Items[Items[int]],
    num_tokens: int,
    forced: Items[Items[int]] | None = None,
) -> Run:
    """All prompts advance together. With `forced` each reads these tokens, whatever it would choose itself."""
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=num_tokens)
    sequences = [sequence(prompt, sampling, i) for i, prompt in enumerate(prompts)]
    run = Run([[] for _ in prompts], [[] for _ in prompts])
    free, live = page_order(runner), list(range(len(prompts)))
    while live:
        plan = plan_for(runner, [sequences[i] for i in live], free, 10**9)
        logprobs = torch.log_softmax(runner.logits(plan).double(), dim=-1)
        best = logprobs.argmax(dim=-1).tolist()
        ended = set()
        for row, i in enumerate(live):
            item, at = sequences[i], len(run.chosen[i])
            token = forced[i][at] if forced is not None else best[row]
            run.chosen[i].append(best[row])
            run.logprobs[i].append(float(logprobs[row, token]))
            item.num_computed += plan.rows[row].num_tokens
            item.token_ids.append(token)
            if at + 1 == num_tokens or token in runner.model_config.eos_token_ids:
                ended.add(i)
        live = [i for i in live if i not in ended]
    return run


def compared(
    runner: ModelRunner, prompts: list[list[int]], num_tokens: int, yardstick: Run
) -> dict[str, float]:
    follow = greedy(runner, prompts, num_tokens, yardstick.chosen)
    equal = [
        a == b
        for pair in zip(follow.chosen, yardstick.chosen, strict=True)
        for a, b in zip(*pair, strict=True)
    ]
    apart = [
        abs(a - b)
        for pair in zip(follow.logprobs, yardstick.logprobs, strict=True)
        for a, b in zip(*pair, strict=True)
    ]
    alone = greedy(runner, prompts, num_tokens)
    prefixes = [common_prefix(a, b) for a, b in zip(alone.chosen, yardstick.chosen, strict=True)]
    return {
        "agreement": round(sum(equal) / len(equal), 4),
        "logprob_diff_mean": round(sum(apart) / len(apart), 5),
        "logprob_diff_max": round(max(apart), 4),
        "common_prefix_mean": round(sum(prefixes) / len(prefixes), 1),
        "identical_answers": sum(a == b for a, b in zip(alone.chosen, yardstick.chosen, strict=True)),
    }


def common_prefix(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def capacity(path: Path, storage: torch.dtype) -> int:
    """Tokens in `CAPACITY_BYTES`."""
    page_size = 16
    pages = fitting_pages(
        Checkpoint.open(str(path)).config,
        page_size=page_size,
        storage=storage,
        device="cpu",
        max_num_seqs=10**9,
        max_model_len=page_size,
        max_num_batched_tokens=page_size,
        memory_bytes=CAPACITY_BYTES,
    )
    return pages * page_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    path = args.model or bundled_model()

    tokenizer = Tokenizer.open(Checkpoint.open(str(path)))
    requests = chats()[:: max(1, 32 // args.prompts)][: args.prompts]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in requests]
    plain = load(path)
    yardstick = greedy(plain, prompts, args.tokens)
    kernels = plain.kernels_name
    del plain
    columns = {
        "int8 cache": compared(load(path, kv_cache_dtype="int8"), prompts, args.tokens, yardstick),
        "int8 products": compared(load(path, quantization="int8"), prompts, args.tokens, yardstick),
        "bf16, reference kernels": compared(load(path, kernels="reference"), prompts, args.tokens, yardstick),
    }
    lengths = [len(tokens) for tokens in yardstick.chosen]
    print(
        f"{len(prompts)} prompts, {sum(lengths)} positions, {sum(lengths) / len(lengths):.1f} tokens an answer"
    )
    print(f"{'against bf16':24s}" + "".join(f"{name:>26s}" for name in columns))
    for figure in columns["int8 cache"]:
        print(f"{figure:24s}" + "".join(f"{column[figure]:26}" for column in columns.values()))
    room = {name: capacity(path, storage) for name, storage in CACHES.items()}
    ratio = round(room["int8"] / room["bf16"], 3)
    print(f"tokens in 1 GiB: bf16 {room['bf16']}, int8 {room['int8']}, ratio {ratio}")
    result = {
        "prompts": len(prompts),
        "positions": sum(lengths),
        "mean_answer_tokens": round(sum(lengths) / len(lengths), 1),
        "int8_cache": columns["int8 cache"],
        "int8_products": columns["int8 products"],
        "bf16_reference_kernels": columns["bf16, reference kernels"],
        "capacity_tokens_per_gib": room,
        "capacity_ratio": ratio,
        "kernels": kernels,
        "model": path.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
