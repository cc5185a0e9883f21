"""Expectations: how many tokens each sequence will probably make, and how many pages all of them will then take.

Owns what learned lengths (`lengths`) mean for a sequence, and the numbers that a `forecast` is made of: which of its
tokens lie on pages that it has to itself, and how many are still to come. Knows neither places nor budgets: who comes
in is decided by whoever asks (`scheduler`).
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from engine.forecast import Forecast
from engine.lengths import OutputLengths
from engine.page_names import PageNames
from engine.pages import PagePool
from engine.prefix_cache import Match
from engine.sequence import Sequence


class Expectations:
    """What is expected of a sequence is kept in it: `expected_tokens`, and `num_shared_pages`."""

    def __init__(self, pool: PagePool, names: PageNames) -> None:
        self.lengths = OutputLengths()
        self._pool = pool
        self._names = names

    def length(self, sequence: Sequence) -> int:
        """How many tokens it will probably generate in all."""
        if sequence.runs_to_the_end:
            return sequence.max_tokens
        keys = self._names.of_prompt(sequence)
        expected = self.lengths.expected(keys, sequence.max_tokens, sequence.num_generated)
        return max(expected, sequence.request.sampling.min_tokens)

    def renew(self, sequence: Sequence) -> None:
        """It has become as long as was expected, and goes on."""
        sequence.expected_tokens = self.length(sequence)

    def learn(self, sequence: Sequence) -> None:
        """It will not go on."""
        output = sequence.output
        if output is not None and not sequence.runs_to_the_end:
            cut = output.finish_reason == "length"
            self.lengths.observe(self._names.of_prompt(sequence), len(output.token_ids), cut=cut)

    def needs(self, sequence: Sequence, match: Match) -> tuple[int, int]:
        """Of one that comes in with what `match` has found: tokens whose pages nobody else owns already, tokens it
        will probably still make."""
        pages = [entry.page for entry in match.whole if entry.page is not None]
        sequence.num_shared_pages = sum(not self._pool.is_cached(page) for page in pages)
        self.renew(sequence)
        return self._own_tokens(sequence), _remaining(sequence)

    def forecast(self, running: Items[Sequence]) -> Forecast:
        """Of those that run."""
        private = sum(len(one.pages) - one.num_shared_pages for one in running)
        return Forecast(
            [self._own_tokens(one) for one in running],
            [_remaining(one) for one in running],
            max(0, self._pool.num_owned - private),
            self._pool.page_size,
        )

    def _own_tokens(self, sequence: Sequence) -> int:
        return len(sequence.token_ids) - sequence.num_shared_pages * self._pool.page_size


def _remaining(sequence: Sequence) -> int:
    return max(1, sequence.expected_tokens - sequence.num_generated)
