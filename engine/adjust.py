"""Adjust: the rules of many sequences applied to the logits of one step.

Owns the order of allowed tokens, biases, penalties and bad words, and their arithmetic but for that of penalties: it
is the kernel set's, so that steps without the host (`decode_steps`) give the same bits. The order is vLLM's, but bad
words come last, so that it can be seen whether they leave anything. Every rule touches its own row and there only
the token ids it names, elementwise, so neither crowd nor order changes a bit. Keeps nothing between steps: what must
be remembered lies in the sequence (`logit_rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from engine.penalties import SeenTokens
from engine.plan import Row
from engine.staging import staged, staged_ints
from kernels import Penalties

_Ids = Items[int]


def adjust(logits: Tensor, rows: list[Row], penalise: Callable[[Tensor, Penalties], None]) -> None:
    """logits `[S, vocab]` fp32, changed in place; `rows` has S entries, those without rules stay as they are;
    `penalise` is the kernel set's.

    A row whose largest logit was not finite keeps a NaN, even where the rules hide it.
    """
    asked = [(i, row.sequence.rules) for i, row in enumerate(rows) if row.sequence.rules is not None]
    index = staged_ints([i for i, _ in asked], logits.device)
    sound = torch.isfinite(logits[index].amax(dim=1))

    allowed = [
        (i, r.sampling.allowed_token_ids) for i, r in asked if r.sampling.allowed_token_ids is not None
    ]
    if allowed:
        _keep_only(logits, allowed)
    biased = [(i, r.sampling.biases) for i, r in asked if r.sampling.biases]
    if biased:
        where = pairs_on(logits.device, [(i, [token_id for token_id, _ in pairs]) for i, pairs in biased])
        biases = np.array([bias for _, pairs in biased for _, bias in pairs], dtype=np.float32)
        logits[where] += staged(biases, logits.device)
    if any(r.counts is not None for _, r in asked):
        penalise(logits, SeenTokens.of([row.sequence for row in rows]).on(logits.device))
    worded = [(i, r) for i, r in asked if r.bad_words]
    if worded:
        banned = ((i, r.banned(rows[i].sequence.token_ids, rows[i].sequence.num_prompt)) for i, r in worded)
        _ban(logits, [(i, ids) for i, ids in banned if ids])
    logits[index, 0] = torch.where(sound, logits[index, 0], float("nan"))


def pairs_on(device: torch.device, ids: Iterable[tuple[int, _Ids]]) -> tuple[Tensor, Tensor]:
    """(row, token ids), at least one → two indices on the device, one entry per (row, token id)."""
    arrays = [(i, np.array(of_row, dtype=np.int64)) for i, of_row in ids]
    at = np.repeat([i for i, _ in arrays], [len(array) for _, array in arrays])
    columns = np.concatenate([array for _, array in arrays])
    return staged(at, device), staged(columns, device)


def _keep_only(logits: Tensor, allowed: Items[tuple[int, _Ids]]) -> None:
    where = pairs_on(logits.device, allowed)
    kept = logits[where]
    logits[staged_ints([i for i, _ in allowed], logits.device)] = float("-inf")
    logits[where] = kept


def _ban(logits: Tensor, banned: list[tuple[int, list[int]]]) -> None:
    """Bad words give way in a row that would have nothing left to choose."""
    if not banned:
        return
    where = pairs_on(logits.device, banned)
    before = logits[where]
    logits[where] = float("-inf")
    index = staged_ints([i for i, _ in banned], logits.device)
    left = logits[index].amax(dim=1) > float("-inf")  # [rows]
    owner = staged(np.repeat(np.arange(len(banned)), [len(ids) for _, ids in banned]), logits.device)
    logits[where] = torch.where(left[owner], float("-inf"), before)
