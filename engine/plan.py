"""Plan: what one step computes and which pages move before it does, and Draws: what came out of it. A plan is made by
the scheduler, turned into tensors by `step_input`, run by `runner`; draws come from the sampler.

Owns nothing but these words; it exists so that the planning half (no torch) and the tensor half of the engine
share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from engine.request import TokenLogprobs
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """`num_tokens` tokens of `sequence`, from its `num_computed` on. Its pages already cover them."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """True when this row computes the sequence's last token, so that a next one is drawn."""
        return self.num_tokens == self.sequence.num_pending


class Move(NamedTuple):
    """One page's contents: `copy` page to page, `out` page to host slot, `in` host slot to page."""

    kind: Literal["copy", "out", "in"]
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`moves` happen before the rows are computed, in their order: a page may be read by one move and be
    overwritten by a later one or by a row."""

    rows: tuple[Row, ...]
    moves: tuple[Move, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def sampling_rows(self) -> list[Row]:
        return [row for row in self.rows if row.samples]


class Draws(NamedTuple):
    """`token_ids`: one per sampling row, in order, -1 for a row whose logits were not finite. `logprobs`: by
    number of the sampling row, for rows that ask for them and did not fail."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
