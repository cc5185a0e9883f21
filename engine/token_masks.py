"""TokenMasks: on the logits of a step, every token that a row's grammar does not allow becomes impossible.

Owns the memory of the masks and their way to the device. Grammars and their states are `matcher`'s. Rows are
handled each by itself, so the crowd in a step changes nothing; a step without grammars costs one look at its rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.matcher import fill
from engine.plan import Row
from engine.staging import staged, staged_ints


class TokenMasks:
    def __init__(self) -> None:
        self._masks = np.empty((0, 0), dtype=np.int32)  # [rows, words], kept for the next step

    def apply(self, logits: Tensor, rows: list[Row]) -> None:
        """logits `[S, vocab]`, any float dtype, changed in place; `rows` has S entries, those without a grammar stay
        as they are. Tokens of the model that its tokenizer lacks are never allowed.

        A row whose largest logit was not finite, or whose grammar has failed, keeps a NaN.
        """
        matchers = [(i, m) for i, row in enumerate(rows) if (m := row.sequence.matcher) is not None]
        if not matchers:
            return
        words = matchers[0][1].num_words
        if len(self._masks) < len(matchers) or self._masks.shape[1] != words:
            self._masks = np.empty((max(len(matchers), 2 * len(self._masks)), words), dtype=np.int32)
        sequences = [rows[i].sequence for i, _ in matchers]
        samples = [(m, s.token_ids, s.num_prompt) for (_, m), s in zip(matchers, sequences, strict=True)]
        fill(samples, self._masks)

        device, vocab = logits.device, logits.shape[1]
        denied = _denied(self._masks[: len(matchers)], device)[:, :vocab]  # [rows with a grammar, vocab]
        index = staged_ints([i for i, _ in matchers], device)
        failed = staged(np.array([bool(matcher.error) for _, matcher in matchers]), device)
        picked = logits[index]
        failed |= ~torch.isfinite(picked.amax(dim=1))
        picked = torch.where(denied, float("-inf"), picked)
        picked[:, 0].masked_fill_(failed, float("nan"))
        logits[index] = picked


def _denied(masks: NDArray[np.int32], device: torch.device) -> Tensor:
    """masks `[rows, words]` → bool `[rows, 32 · words]`, true where the bit is not set. A CPU unpacks them at once
    with numpy, for a GPU an eighth of the bytes travel."""
    packed = ~masks.view(np.uint8)
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little")).view(torch.bool)
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    return (staged(packed, device)[:, :, None] >> bits & 1).flatten(1).bool()
