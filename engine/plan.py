"""Plan: what one step computes. Made by the scheduler, turned into tensors by `step_input`, run by `runner`.

Owns nothing but the pairs; it exists so that the planning half (no torch) and the tensor half of the engine
share one frozen word.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Plan:
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def sampling_rows(self) -> list[Row]:
        return [row for row in self.rows if row.samples]
