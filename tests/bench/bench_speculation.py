"""What guessed tokens bring where few requests run: one of them, and the last four of a batch, with and without.

`python -m tests.bench.bench_speculation [--pairs N] [--new N] [--most N] [--dtype bfloat16] [--model PATH]`

Two engines on the same weights in one process, in alternating pairs. Two kinds of prompts: *copying* asks to repeat a
text of records, *inventing* to write something new. Greedy, end of sequence ignored; answers must be equal where the
engines are deterministic. The last line is JSON: output tokens per second, ratios (medians over the pairs; above 1:
guesses gain), and which share of the guesses was accepted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.llm import LLM
from engine.sampling_params import SamplingParams
from tests.bench.bench_engine import Run, bundled_model, in_pairs

RECORDS = "\n".join(
    f"order {1000 + 7 * number}: {name}, {3 + number} boxes of {what}, to be sent on day {number + 11}"
    for number, (name, what) in enumerate(
        zip(
            ("Amara Obi", "Jonas Weber", "Mei Tanaka", "Luis Ortega", "Freya Lund", "Ravi Patel"),
            ("paper", "ink", "glue", "thread", "type", "cloth"),
            strict=True,
        )
    )
)
PROMPTS = {
    "copying": [
        f"Repeat these orders word by word, without any change, {how}:\n{RECORDS}"
        for how in ("in this order", "please", "as a list", "from the first one to the last")
    ],
    "inventing": [
        f"Write a story about {what} in a town by the sea, with many different people and no repetitions."
        for what in (
            "a clockmaker",
            "a lost letter",
            "two rival bakers",
            "the night shift of a printing house",
        )
    ],
}


class Side:
    """One engine and what it has been told."""

    def __init__(self, path: str, dtype: str, num_speculative_tokens: int) -> None:
        settings: dict[str, Any] = {"dtype": dtype, "device": "cpu", "enable_prefix_caching": False}
        self.llm = LLM(path, num_speculative_tokens=num_speculative_tokens, **settings)
        self.said: list[tuple[int, ...]] = []

    def run(self, prompts: list[str], num_new: int) -> int:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        self.said = [output.outputs[0].token_ids for output in self.llm.chat(chats, sampling, use_tqdm=False)]
        return sum(map(len, self.said))

    def guesses(self) -> tuple[float, float]:
        """Made and accepted, so far."""
        stats = self.llm.engine.stats()
        return stats["num_draft_tokens"], stats["num_accepted_tokens"]


def compared(sides: tuple[Side, Side], prompts: list[str], num_new: int, num_pairs: int) -> dict[str, float]:
    """`sides`: without guesses, with them."""
    pairs: list[tuple[Run, Run]] = []
    before = sides[1].guesses()
    runs = partial(sides[0].run, prompts, num_new), partial(sides[1].run, prompts, num_new)
    for pair in in_pairs(runs, num_pairs):
        pairs.append(pair)
        if sides[0].llm.engine.runner.deterministic:
            assert sides[0].said == sides[1].said, "a guess has changed a token"
    made, accepted = (after - start for after, start in zip(sides[1].guesses(), before, strict=True))
    return {
        "off_tok_s": round(statistics.median(off.tokens_per_second for off, _ in pairs), 1),
        "on_tok_s": round(statistics.median(on.tokens_per_second for _, on in pairs), 1),
        "ratio": round(
            statistics.median(on.tokens_per_second / off.tokens_per_second for off, on in pairs), 3
        ),
        "cpu_ratio": round(statistics.median(off.cpu_seconds / on.cpu_seconds for off, on in pairs), 3),
        "accepted_share": round(accepted / made, 3) if made else 0.0,
        "accepted_per_token": round(accepted / (num_pairs * len(prompts) * num_new), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new", type=int, default=192)
    parser.add_argument("--most", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", type=Path, default=None)
    args = parser.parse_args()
    path = str(args.model or bundled_model())

    sides = Side(path, args.dtype, 0), Side(path, args.dtype, args.most)
    for side in sides:
        side.run(PROMPTS["inventing"][:1], 8)
    result: dict[str, object] = {
        "bench": "speculation",
        "dtype": args.dtype,
        "most": args.most,
        "new": args.new,
    }
    for kind, prompts in PROMPTS.items():
        for name, few in (("single", prompts[:1]), ("four", prompts)):
            figures = compared(sides, few, args.new, args.pairs)
            result[f"{kind}_{name}"] = figures
            print(f"{kind}, {name}: {figures}", flush=True)
    result |= {
        "pairs": args.pairs,
        "deterministic": sides[0].llm.engine.runner.deterministic,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
