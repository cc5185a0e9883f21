"""Drives a `ModelRunner` without a scheduler: every sequence advances by a chunk per step.

So the tensor half can be tested alone. Pages are handed out in a shuffled order and never shared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Items

from engine.plan import Plan, Row
from engine.request import Request, RequestId
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


def sequence(prompt: Items[int], sampling: SamplingParams, index: int = 0) -> Sequence:
    request = Request(id=RequestId(f"job-{index}", 1), prompt_token_ids=tuple(prompt), sampling=sampling)
    return Sequence(request, 0, sampling.max_tokens or 1)


def page_order(runner: ModelRunner) -> list[int]:
    pages = list(range(min(runner.num_pages, 4096)))
    random.Random(5).shuffle(pages)
    return pages


def plan_for(runner: ModelRunner, sequences: Items[Sequence], free: list[int], chunk: int) -> Plan:
    rows = []
    for item in sequences:
        count = min(chunk, item.num_pending)
        while len(item.pages) * runner.page_size < item.num_computed + count:
            item.pages.append(free.pop())
        rows.append(Row(item, count))
    return Plan(tuple(rows))


def rollout(
    runner: ModelRunner,
    prompts: Items[Items[int]],
    sampling: Items[SamplingParams],
    *,
    chunk: int = 10**9,
) -> list[list[int]]:
    """The generated tokens of each prompt, all advancing together; a failed sequence ends with -1."""
    sequences = [sequence(p, s, i) for i, (p, s) in enumerate(zip(prompts, sampling, strict=True))]
    free, live = page_order(runner), list(sequences)
    while live:
        plan = plan_for(runner, live, free, chunk)
        tokens = iter(runner.run(plan).token_ids)
        for row in plan.rows:
            samples = row.samples
            row.sequence.num_computed += row.num_tokens
            if samples:
                row.sequence.token_ids.append(next(tokens))
        live = [s for s in live if s.num_generated < s.max_tokens and s.token_ids[-1] != -1]
    return [s.generated for s in sequences]
