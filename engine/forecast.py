"""Forecast: the most pages that the running sequences will own at once, if each ends at its expected length.

Owns one formula. Sequences grow by a token a step and end at different times, so the peak lies far below the sum
of their final sizes: just before the one with the k-th most to go ends, it and the k - 1 longer ones are still
there, and each has grown by what the k-th had to go. The peak is the largest of these sums. While even the sum of
the final sizes has room nobody need know it, and nothing is sorted. Knows neither who the sequences are nor where the
expectations come from (`lengths`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

_NOBODY: Final[NDArray[np.int64]] = np.empty(0, dtype=np.int64)


class Forecast:
    """`tokens`: each sequence has now, those on shared pages left out; `remaining`: each has still to generate, the
    last of which needs no slot; `shared`: owned pages that no single sequence can give back."""

    def __init__(self, tokens: Sequence[int], remaining: Sequence[int], shared: int, page_size: int) -> None:
        self._shared = shared
        self._page_size = page_size
        self._waste = (page_size - 1) / 2  # a last page is on average half empty
        # tokens, if all were at their ends at once
        self._final = sum(tokens) + sum(remaining) + len(tokens) * (self._waste - 1)
        self._given = tokens, remaining
        self._added: list[tuple[int, int]] = []  # and not in the arrays yet
        self._tokens: NDArray[np.int64] | None = None  # both with the most to go first
        self._remaining: NDArray[np.int64] = _NOBODY
        self._numbers: NDArray[np.int64] = _NOBODY
        self._asked: tuple[int, int] | None = None  # whom `_with` has
        self._with = _NOBODY, _NOBODY

    def fits(self, tokens: int, remaining: int, limit: float) -> bool:
        """Whether the peak stays within `limit` pages if one more sequence joined."""
        final = self._final + tokens + remaining - 1 + self._waste
        return self._shared + final / self._page_size <= limit or self.peak_with(tokens, remaining) <= limit

    def peak_with(self, tokens: int, remaining: int) -> float:
        """The peak in pages if one more sequence joined."""
        return self._peak(*self._joined(tokens, remaining))

    def add(self, tokens: int, remaining: int) -> None:
        """Mostly the one that was asked about last."""
        self._final += tokens + remaining - 1 + self._waste
        if self._asked == (tokens, remaining):
            self._tokens, self._remaining = self._with
        else:
            self._added.append((tokens, remaining))
        self._asked = None

    def _sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and remaining of all who have joined."""
        if self._tokens is None:
            given, left = (np.array(one, dtype=np.int64) for one in self._given)
            order = np.argsort(-left, kind="stable")
            self._tokens, self._remaining = given[order], left[order]
        for one in self._added:
            self._tokens, self._remaining = _with_one(self._tokens, self._remaining, *one)
        self._added.clear()
        return self._tokens, self._remaining

    def _joined(self, tokens: int, remaining: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._asked != (tokens, remaining):
            self._with = _with_one(*self._sorted(), tokens, remaining)
            self._asked = tokens, remaining
        return self._with

    def _peak(self, tokens: NDArray[np.int64], remaining: NDArray[np.int64]) -> float:
        each = remaining - 1 + self._waste
        if len(self._numbers) < len(tokens):
            self._numbers = np.arange(1, 2 * len(tokens) + 1)
        owned = np.cumsum(tokens) + self._numbers[: len(tokens)] * each
        return float(self._shared + owned.max(initial=0) / self._page_size)


def _with_one(
    ordered: NDArray[np.int64], by: NDArray[np.int64], tokens: int, remaining: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and remaining with one more; both with the most to go first."""
    at = int((-by).searchsorted(-remaining))
    return _inserted(ordered, at, tokens), _inserted(by, at, remaining)


def _inserted(numbers: NDArray[np.int64], at: int, number: int) -> NDArray[np.int64]:
    """As `np.insert`, which takes ten times as long."""
    longer = np.empty(len(numbers) + 1, dtype=np.int64)
    longer[:at] = numbers[:at]
    longer[at] = number
    longer[at + 1 :] = numbers[at:]
    return longer
