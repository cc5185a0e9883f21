"""Penalties: the tokens that rows have seen, as tensors for a kernel set.

Owns the way from sequences' counts (`logit_rules`) to those tensors, and their room on a device for steps without the
host, where they are written once and then kept up by the kernels. Knows no logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.logit_rules import MOST_COUNTED, TokenCounts
from engine.sequence import Sequence
from engine.staging import put, staged
from kernels import Penalties


class SeenTokens(NamedTuple):
    """Of each row its distinct tokens and how often each was generated, as far as it has penalties."""

    entries: NDArray[np.int32]  # [2, S, N]: token ids, times; N at least 1
    lengths: NDArray[np.int32]  # [S], 0 without penalties
    factors: NDArray[np.float32]  # [3, S]: repetition, frequency, presence

    @classmethod
    def of(cls, sequences: Items[Sequence]) -> SeenTokens:
        counts = [_counts(one) for one in sequences]
        lengths = np.array([0 if one is None else len(one.token_ids) for one in counts], dtype=np.int32)
        entries = np.zeros((2, len(counts), max(1, lengths.max(initial=0))), dtype=np.int32)
        for row, (one, length) in enumerate(zip(counts, lengths, strict=True)):
            if one is not None:
                entries[0, row, :length], entries[1, row, :length] = one.token_ids, one.generated
        params = [one.request.sampling for one in sequences]
        factors = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        return cls(entries, lengths, np.array(factors, dtype=np.float32).reshape(-1, 3).T.copy())

    def on(self, device: torch.device) -> Penalties:
        return _penalties(*(staged(one, device) for one in self))


def _penalties(entries: Tensor, lengths: Tensor, factors: Tensor) -> Penalties:
    """entries `[2, S, N]`, lengths `[S]`, factors `[3, S]`, as in `SeenTokens`."""
    repetition, frequency, presence = factors
    return Penalties(entries[0], entries[1], lengths, repetition, frequency, presence)


def _counts(sequence: Sequence) -> TokenCounts | None:
    """Up to its last token."""
    counts = None if sequence.rules is None else sequence.rules.counts
    if counts is not None:
        counts.update(sequence.token_ids, sequence.num_prompt)
    return counts


class KeptPenalties:
    """Room on a device for the penalties of `most_rows` rows, at fixed addresses. `most_new`: tokens that a row may
    draw before its counts are written anew; `most_distinct`: that it can have at all."""

    def __init__(self, most_rows: int, *, most_new: int, most_distinct: int, device: torch.device) -> None:
        room = min(MOST_COUNTED + most_new, most_distinct)
        self._entries = torch.empty((2, most_rows, room), dtype=torch.int32, device=device)
        self._lengths = torch.zeros(most_rows, dtype=torch.int32, device=device)
        self._factors = torch.ones((3, most_rows), dtype=torch.float32, device=device)

    def of(self, rows: int) -> Penalties:
        """Of the first rows."""
        return _penalties(self._entries[:, :rows], self._lengths[:rows], self._factors[:, :rows])

    def write(self, sequences: Items[Sequence], rows: int) -> None:
        """Those of the sequences; rows behind them, up to `rows`, have none."""
        seen, count = SeenTokens.of(sequences), len(sequences)
        put(seen.entries, self._entries[:, :count, : seen.entries.shape[2]])
        put(np.pad(seen.lengths, (0, rows - count)), self._lengths[:rows])
        put(seen.factors, self._factors[:, :count])

    def clear(self) -> Tensor:
        """From now on no row has any. What `restore` takes."""
        lengths = self._lengths.clone()
        self._lengths.zero_()
        return lengths

    def restore(self, lengths: Tensor) -> None:
        self._lengths.copy_(lengths)
