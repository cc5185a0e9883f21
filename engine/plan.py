"""Plan: what one step computes and which pages move before it does, and Draws: what came out of it. A plan is made by
the scheduler, turned into tensors by `step_input`, run by `runner`; draws come from the sampler.

Owns nothing but these words; it exists so that the planning half (no torch) and the tensor half of the engine
share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from engine.request import TokenLogprobs
from engine.sequence import Sequence

PromptScores: TypeAlias = list[TokenLogprobs] | None  # None: something was not finite


@dataclass(frozen=True, slots=True)
class Row:
    """`num_tokens` tokens of `sequence`, from its `num_computed` on, and behind its last one `proposed` tokens, which
    it does not have and may never get (`speculation`). Its pages already cover them all."""

    sequence: Sequence
    num_tokens: int
    proposed: tuple[int, ...] = ()

    @property
    def num_queries(self) -> int:
        """Tokens that the step computes for it."""
        return self.num_tokens + len(self.proposed)

    @property
    def samples(self) -> bool:
        """True when this row computes the sequence's last token, so that a next one is drawn."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def scored(self) -> range:
        """Positions among these tokens whose logits say how likely the prompt's next token was, if that is asked
        for and not known yet."""
        known, start = self.sequence.prompt_logprobs, self.sequence.num_computed
        if known is None:
            return range(0)
        return range(max(start, len(known)), min(start + self.num_tokens, self.sequence.num_prompt - 1))


class Move(NamedTuple):
    """One page's contents: `copy` page to page, `out` page to host slot, `in` host slot to page."""

    kind: Literal["copy", "out", "in"]
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Plan:
    """`moves` happen before the rows are computed, in their order: a page may be read by one move and be
    overwritten by a later one or by a row.

    `num_steps` above 1: each row computes its last token, draws the next, and so on, so many times or up to its
    sequence's `max_tokens`; its pages cover that (`multi_step`). `behind` above 0: it is launched while a plan of so
    many steps for the same rows runs, and goes on where that one stops; rows whose sequences have no pages any more
    are nobody's.
    """

    rows: tuple[Row, ...]
    moves: tuple[Move, ...] = ()
    num_steps: int = 1
    behind: int = 0

    @property
    def num_tokens(self) -> int:
        """That are computed."""
        return self.num_steps * sum(row.num_queries for row in self.rows)

    @property
    def sampling_rows(self) -> list[Row]:
        return [row for row in self.rows if row.samples]

    @property
    def num_draws(self) -> int:
        """Of a step: one of each row that samples, and one behind each token that is proposed."""
        return sum(1 + len(row.proposed) for row in self.rows if row.samples)


class Draft:
    """A plan in the making: how many tokens each row has, and how many are left of the `budget`."""

    __slots__ = ("budget", "rows")

    def __init__(self, budget: int) -> None:
        self.rows: dict[Sequence, int] = {}
        self.budget = budget

    def give(self, sequence: Sequence) -> None:
        self.rows[sequence] = min(sequence.num_pending, self.budget)
        self.budget -= self.rows[sequence]

    def take_back(self, sequence: Sequence) -> None:
        self.budget += self.rows.pop(sequence, 0)


FAILED = -1  # in place of a token: this row's logits were not finite


class OutOfDeviceMemory(Exception):
    """A plan needs more memory beside the pages than the device has. Its moves are made, or will be before those of
    the next one; nothing else of it holds."""


class Draws(NamedTuple):
    """`token_ids`: one per sampling row, in order, -1 for a row whose logits were not finite. `logprobs`: by
    number of the sampling row, for rows that ask for them and did not fail. `prompt_logprobs`: by number of the row
    in the plan, one per position in `Row.scored`; None for a row whose logits were not finite, which draws no token
    either. `further`: what each sampling row drew behind that, in the further steps of a plan of several, or behind
    proposed tokens that were right; empty where no row could. `further_logprobs`: of `further`, by number of the
    sampling row, as far as the row's tokens are sound."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: Mapping[int, PromptScores] = MappingProxyType({})
    further: tuple[list[int], ...] = ()
    further_logprobs: Mapping[int, list[TokenLogprobs]] = MappingProxyType({})

    @classmethod
    def of_steps(cls, rows: tuple[Row, ...], tokens: list[list[int]], values: list[list[float]]) -> Draws:
        """What rows that decode drew in several steps. tokens and values `[rows][steps]`: each token's id and, where
        some row asks for them, its logprob; one that is not finite fails its token."""
        firsts, further = {}, {}
        for number, (row, drawn, likely) in enumerate(zip(rows, tokens, values, strict=False)):
            if row.sequence.request.sampling.logprobs is None:
                continue
            told = []
            for step, (token_id, value) in enumerate(zip(drawn, likely, strict=True)):
                if token_id < 0 or not isfinite(value):
                    drawn[step] = FAILED
                    break
                told.append(TokenLogprobs(token_id=token_id, logprob=value))
            if told:
                firsts[number], *further[number] = told
        behind = tuple(drawn[1:] for drawn in tokens)
        return cls([drawn[0] for drawn in tokens], firsts, further=behind, further_logprobs=further)

    def only(self, numbers: list[int]) -> Draws:
        """Of these sampling rows, of a plan whose rows all sample and have no `prompt_logprobs`."""
        places = {number: place for place, number in enumerate(numbers)}
        return Draws(
            [self.token_ids[number] for number in numbers],
            {places[number]: told for number, told in self.logprobs.items() if number in places},
            further=tuple(self.further[number] for number in numbers),
            further_logprobs={
                places[number]: told for number, told in self.further_logprobs.items() if number in places
            },
        )

    def with_scores(self, plan: Plan, scores: Mapping[int, PromptScores]) -> Draws:
        """These draws, and `scores` as their `prompt_logprobs`."""
        failed = {plan.rows[place].sequence for place, made in scores.items() if made is None}
        drawn = zip(self.token_ids, plan.sampling_rows, strict=True)
        token_ids = [FAILED if row.sequence in failed else token_id for token_id, row in drawn]
        return self._replace(token_ids=token_ids, prompt_logprobs=scores)


Launched: TypeAlias = Callable[[], Draws]  # of a plan that runs: waits for what it draws
