"""NgramProposer: what one sequence will probably say next, read off what it has said and been told before.

Owns an index of the n-grams of a sequence's tokens and how many tokens it pays to propose for it. Where the last
tokens stood before, what followed them then is proposed: the longest n-gram decides, of equals the one seen last.
Prompts that invite copying (rewriting, extraction, code) and samples that loop are guessed well, others badly, so
the number adapts to what was accepted, and who is guessed badly rests. After prompt lookup decoding (Saxena 2023).
Knows neither the batch nor pages (`speculation`), and draws nothing: a wrong proposal costs time and changes nothing.
"""

from __future__ import annotations

SIZES = (4, 3, 2)  # of the n-grams, in the order they are asked
FIRST = 4  # tokens of the first proposal
POOR = 0.15  # share of proposed tokens that are accepted, below which a sequence rests
INERTIA = 0.8  # of that share, an average in which the last proposals count most
REST = 16  # tokens until a resting sequence is tried again; twice as many each time


class NgramProposer:
    """Of one sequence, whose tokens only ever grow. A token costs O(1), those before the first call too."""

    __slots__ = ("_count", "_ends", "_rest", "_resumes_at", "_seen", "_share")

    def __init__(self) -> None:
        # n-gram → where the token behind it stands
        self._ends: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in SIZES}
        self._seen = 0  # tokens behind which an n-gram was indexed
        self._count = FIRST
        self._share = 0.5
        self._rest = REST
        self._resumes_at = 0  # with so many tokens

    def propose(self, token_ids: list[int], most: int) -> tuple[int, ...]:
        """At most `most` tokens to stand behind all of the sequence's; none where nothing is known or it rests. What
        followed may reach its end: a loop is taken to go on."""
        if most < 1 or len(token_ids) < self._resumes_at:
            return ()
        self._index(token_ids)
        for size in SIZES:
            end = self._ends[size].get(tuple(token_ids[-size:]))
            if end is not None:
                period = len(token_ids) - end
                return tuple(token_ids[end + i % period] for i in range(min(most, self._count)))
        return ()

    def observe(self, num_tokens: int, num_proposed: int, num_accepted: int) -> None:
        """How a proposal fared. `num_tokens`: of the sequence, with those that were accepted."""
        if num_accepted == num_proposed:
            self._count = max(self._count, 2 * num_proposed)
        else:
            self._count = max(1, num_accepted + 1 if num_accepted else self._count // 2)
        self._share = INERTIA * self._share + (1 - INERTIA) * num_accepted / num_proposed
        if self._share < POOR:
            self._resumes_at = num_tokens + self._rest
            self._rest *= 2
            self._share = 2 * POOR
        elif self._share > 0.5:
            self._rest = REST

    def _index(self, token_ids: list[int]) -> None:
        """Take in all n-grams that have a token behind them."""
        last = len(token_ids) - 1
        for size, ends in self._ends.items():
            first = max(self._seen + 1, size)
            if first <= last:
                columns = (token_ids[first - size + i : last - size + i + 1] for i in range(size))
                ends.update(zip(zip(*columns, strict=True), range(first, last + 1), strict=True))
        self._seen = max(self._seen, last)
