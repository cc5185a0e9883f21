"""Forecast: the most pages that the running sequences will own at once, if each ends at its expected length.

Owns one formula. Sequences grow by a token a step and end at different times, so the peak lies far below the sum
of their final sizes: just before the one with the k-th most to go ends, it and the k - 1 longer ones are still
there, and each has grown by what the k-th had to go. The peak is the largest of these sums. Knows neither who
the sequences are nor where the expectations come from (`lengths`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Forecast:
    """`tokens`: each sequence has now, those on shared pages left out; `remaining`: each has still to generate, the
    last of which needs no slot; `shared`: owned pages that no single sequence can give back."""

    def __init__(self, tokens: list[int], remaining: list[int], shared: int, page_size: int) -> None:
        order = np.argsort(np.negative(np.array(remaining, dtype=np.int64)), kind="stable")
        self._remaining: NDArray[np.int64] = np.array(remaining, dtype=np.int64)[order]  # most first
        self._tokens: NDArray[np.int64] = np.array(tokens, dtype=np.int64)[order]
        self._shared = shared
        self._page_size = page_size
        self._numbers = np.arange(1, len(tokens) + 1)
        self._asked: tuple[int, int] | None = None  # whom `_with` has
        self._with = self._tokens, self._remaining

    def peak_with(self, tokens: int, remaining: int) -> float:
        """The peak in pages if one more sequence joined."""
        return self._peak(*self._joined(tokens, remaining))

    def add(self, tokens: int, remaining: int) -> None:
        """Mostly the one that was asked about last."""
        self._tokens, self._remaining = self._joined(tokens, remaining)
        self._asked = None

    def _joined(self, tokens: int, remaining: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._asked != (tokens, remaining):
            at = int((-self._remaining).searchsorted(-remaining))
            self._with = _inserted(self._tokens, at, tokens), _inserted(self._remaining, at, remaining)
            self._asked = tokens, remaining
        return self._with

    def _peak(self, tokens: NDArray[np.int64], remaining: NDArray[np.int64]) -> float:
        # a last page is on average half empty
        each = remaining - 1 + (self._page_size - 1) / 2
        if len(self._numbers) < len(tokens):
            self._numbers = np.arange(1, 2 * len(tokens) + 1)
        owned = np.cumsum(tokens) + self._numbers[: len(tokens)] * each
        return float(self._shared + owned.max(initial=0) / self._page_size)


def _inserted(numbers: NDArray[np.int64], at: int, number: int) -> NDArray[np.int64]:
    """As `np.insert`, which takes ten times as long."""
    longer = np.empty(len(numbers) + 1, dtype=np.int64)
    longer[:at] = numbers[:at]
    longer[at] = number
    longer[at + 1 :] = numbers[at:]
    return longer
