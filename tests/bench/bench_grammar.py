"""What structured outputs cost, on SmolLM2's tokenizer and without its weights: compiles, masks, hostile grammars.

`python -m tests.bench.bench_grammar [--rows N] [--steps N]`

Samples walk through the schemas of tests/support/grammars.py, each by tokens drawn at random from its mask; one that
ends makes room for the next. `mask` is the time to fill all rows' masks, `apply` the rest of the way onto logits
`[rows, vocabulary]`. Hostile grammars are compiled one by one and walked for 40 tokens. Milliseconds; the last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time

import numpy as np
import torch

from engine import matcher
from engine.checkpoint import Checkpoint
from engine.grammars import GrammarError, Grammars
from engine.matcher import Matcher
from engine.plan import Row
from engine.request import Request, RequestId
from engine.sampling_params import InvalidParameter, SamplingParams, StructuredOutputsParams
from engine.sequence import Sequence
from engine.token_masks import TokenMasks
from engine.tokenizer import Tokenizer
from tests.support.grammars import HOSTILE, SCHEMAS
from tests.support.smollm2 import bundled

VOCAB_SIZE, EOS_TOKEN_ID = 49_152, 2
WISHES = [StructuredOutputsParams(json=schema) for schema in SCHEMAS.values()]


def milliseconds(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)


def summary(times: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(times), 3),
        "p99": round(float(np.quantile(times, 0.99)), 3),
        "most": round(max(times), 3),
    }


def drawn(mask: np.ndarray, rng: random.Random) -> int:
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(allowed[rng.randrange(len(allowed))])


def _matcher(row: Row) -> Matcher:
    assert row.sequence.matcher is not None
    return row.sequence.matcher


def walk(grammars: Grammars, rows: int, steps: int) -> tuple[list[float], list[float]]:
    """Times of filling the masks, and of bringing them onto the logits."""
    rng, masks = random.Random(0), TokenMasks()
    fills: list[float] = []
    applies: list[float] = []

    def begin() -> Row:
        sampling = SamplingParams(seed=0, structured_outputs=rng.choice(WISHES))
        sequence = Sequence(Request(id=RequestId("", 0), prompt_token_ids=(1,), sampling=sampling), 0, 1)
        (sequence.matcher,) = grammars.matchers(sampling.structured_outputs, [()])
        return Row(sequence, sequence.num_pending)

    live = [begin() for _ in range(rows)]
    logits = torch.zeros(rows, VOCAB_SIZE)
    memory = np.zeros((rows, _matcher(live[0]).num_words), dtype=np.int32)
    for _ in range(steps):
        samples = [(_matcher(row), row.sequence.token_ids, 1) for row in live]
        started = time.perf_counter()
        matcher.fill(samples, memory)
        fills.append(milliseconds(started))
        started = time.perf_counter()
        masks.apply(logits, live)  # fills once more, from what the library keeps of the last time
        applies.append(milliseconds(started))
        for i, row in enumerate(live):
            token_id = drawn(memory[i], rng)
            row.sequence.token_ids.append(token_id)
            if token_id == EOS_TOKEN_ID:
                live[i] = begin()
    return fills, applies


def hostile(grammars: Grammars, kind: str, source: str) -> dict[str, object]:
    """How long its compile and its slowest mask took, and how it ended."""
    rng = random.Random(0)
    started = time.perf_counter()
    try:
        (one,) = grammars.matchers(StructuredOutputsParams(**{kind: source}), [()])
    except (GrammarError, InvalidParameter) as error:
        return {"compile": milliseconds(started), "mask": 0.0, "end": str(error)[:70]}
    compiled, slowest = milliseconds(started), 0.0
    token_ids: list[int] = []
    mask = np.zeros((1, one.num_words), dtype=np.int32)
    while len(token_ids) < 40 and EOS_TOKEN_ID not in token_ids:
        started = time.perf_counter()
        matcher.fill([(one, token_ids, 0)], mask)
        slowest = max(slowest, milliseconds(started))
        if one.error:
            return {"compile": compiled, "mask": slowest, "end": one.error[:70]}
        token_ids.append(drawn(mask[0], rng))
    return {"compile": compiled, "mask": slowest, "end": "runs"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    path = bundled()
    assert path is not None, "make model"
    grammars = Grammars(Tokenizer.open(Checkpoint.open(str(path))), VOCAB_SIZE, (EOS_TOKEN_ID,))
    started = time.perf_counter()
    grammars.matchers(StructuredOutputsParams(choice=("a",)), [()])
    setup = milliseconds(started)
    compiles = []
    for wish in WISHES:
        started = time.perf_counter()
        grammars.matchers(wish, [()])
        compiles.append(milliseconds(started))
    walk(grammars, options.rows, 20)
    fills, applies = walk(grammars, options.rows, options.steps)
    tried = {name: hostile(grammars, kind, source) for name, (kind, source) in HOSTILE.items()}
    for name, result in tried.items():
        print(f"{name:28s} compile {result['compile']:7.1f}  mask {result['mask']:7.1f}  {result['end']}")
    figures = {
        "bench": "grammar",
        "cpu": platform.processor() or platform.machine(),
        "rows": options.rows,
        "tokenizer_setup": round(setup, 1),
        "compile": summary(compiles),
        "mask": summary(fills),
        "apply": summary(applies),
        "hostile_compile_most": round(max(float(str(one["compile"])) for one in tried.values()), 1),
        "hostile_mask_most": round(max(float(str(one["mask"])) for one in tried.values()), 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
