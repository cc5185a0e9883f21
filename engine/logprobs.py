"""Logprobs: how likely tokens were, from logits that nothing has been done to.

Owns how the kernel set's `normalisers` become every logprob, of generated tokens (`sampler`, `decode_steps`) and of
prompts alike, what is told of it, and how many rows of logits a prompt may take at a time. Knows neither how a token
was chosen nor where logits come from.
All of it is exact in any crowd: a row's values are the same bits in any number of rows and in any slice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from engine.plan import Plan, PromptScores
from engine.request import TokenLogprobs
from engine.staging import staged_ints
from kernels import Normalisers
from kernels.ranking import ranked

SLICE_BYTES = 64 * 2**20  # fp32 logits of a prompt that exist at a time


def logprobs_of(logits: Tensor, token_ids: Tensor, of: Normalisers) -> Tensor:
    """`[N]` fp32: how likely one token of each row was. logits `[N, vocab]`, any float dtype; token_ids `[N]` int64,
    where a negative one stands for any."""
    found = logits.gather(1, token_ids.clamp(min=0)[:, None])[:, 0]
    return (found.float() - of.largest) - of.log_sums


def token_logprobs(
    logits: Tensor, token_ids: Tensor, counts: list[int], of: Normalisers
) -> list[TokenLogprobs | None]:
    """logits `[N, vocab]`, any float dtype, token_ids `[N]` int64, counts: how many of the likeliest each row wants.
    None where the id is negative or its logprob not finite."""
    values = logprobs_of(logits, token_ids, of)
    sound = torch.isfinite(values) & (token_ids >= 0)
    wide = [i for i, count in enumerate(counts) if count]
    top: dict[int, tuple[tuple[int, float], ...]] = {}
    if wide:
        index = staged_ints(wide, logits.device)
        all_of = logits[index].float() - of.largest[index, None] - of.log_sums[index, None]
        best, order = ranked(all_of, min(max(counts), logits.shape[1]))
        for i, ids, likeliest in zip(wide, order.tolist(), best.tolist(), strict=True):
            top[i] = tuple(zip(ids, likeliest, strict=True))[: counts[i]]
    rows = zip(token_ids.tolist(), values.tolist(), sound.tolist(), strict=True)
    return [
        TokenLogprobs(token_id=token_id, logprob=value, top=top.get(i, ())) if fine else None
        for i, (token_id, value, fine) in enumerate(rows)
    ]


def slice_rows(vocab_size: int, multiple: int) -> int:
    """How many rows of logits make `SLICE_BYTES`: a multiple of `multiple`, and at least that."""
    return max(1, SLICE_BYTES // (4 * vocab_size * multiple)) * multiple


def score_prompts(
    plan: Plan,
    scored_rows: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    at_once: int,
    normalisers: Callable[[Tensor], Normalisers],
) -> dict[int, PromptScores]:
    """How likely the prompts' tokens were behind each position in `Row.scored`, by number of the row in the plan.

    scored_rows `[N]`: those positions as `StepInput` has them, padding included; `logits_of` gives the logits
    `[n, vocab]` of n of them and is asked for `at_once` at a time; `normalisers` is the kernel set's.
    """
    token_ids: list[int] = []
    counts: list[int] = []
    for row in plan.rows:
        scored, sequence = row.scored, row.sequence
        token_ids += sequence.token_ids[scored.start + 1 : scored.start + 1 + len(scored)]
        counts += [sequence.request.sampling.prompt_logprobs or 0] * len(scored)
    made: list[TokenLogprobs | None] = []
    for start in range(0, len(token_ids), at_once):
        part = slice(start, start + at_once)
        next_ids = staged_ints(token_ids[part], scored_rows.device)
        logits = logits_of(scored_rows[part])[: len(next_ids)]
        made += token_logprobs(logits, next_ids, counts[part], normalisers(logits))
    rest = iter(made)
    scores: dict[int, PromptScores] = {}
    for place, row in enumerate(plan.rows):
        if row.scored:
            of_row = list(islice(rest, len(row.scored)))
            sound = [one for one in of_row if one is not None]
            scores[place] = sound if len(sound) == len(of_row) else None
    return scores
