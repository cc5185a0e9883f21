"""Speculation: which sequences a step computes further than they are, on guessed tokens, and what that brought.

Owns the choice and the counts. Where a step is padded, or reading its weights is what takes time, a few tokens cost
about what one costs; so where few sequences run (the last of a batch, or a single request) proposed tokens fill the
room. The step draws behind each of them, and as long as a token drawn is the one that was proposed, the next draw
counts too. A draw is a function of its logits, seed and position, so the tokens are those that would have come one by
one, at any temperature. What was computed for a wrong proposal lies behind the sequence's computed tokens: nobody
reads it, and the next step writes over it. After speculative decoding (Leviathan et al. 2023). Knows no tensors, and
leaves what is proposed to `ngram_proposer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items

from engine.config import EngineConfig
from engine.multi_step import decodes_freely
from engine.ngram_proposer import NgramProposer
from engine.plan import Draws, Row
from engine.sequence import Sequence

STEP_TOKENS = 16  # of a step, proposed ones included; with more than half as many sequences there is none
ON_CPU = 7  # tokens proposed for a sequence, at most, unless the settings say otherwise


def num_speculative_tokens(config: EngineConfig, *, num_scheduler_steps: int, cheap: bool) -> int:
    """How many tokens may be proposed for a sequence; 0: none. Unless the settings say so, only where steps are
    taken one by one, and a few tokens are `cheap`: where steps are padded to `STEP_TOKENS` or more anyway, or a
    product of few rows takes as long as reading its weight. Elsewhere nobody has measured it."""
    if config.num_speculative_tokens is not None:
        return config.num_speculative_tokens
    return ON_CPU if cheap and num_scheduler_steps == 1 else 0


def accept(rows: Items[Row], drawn: Draws) -> Draws:
    """`drawn`: of each sampling row its draw, then those behind its proposed tokens, one row after another. The draws
    that count: a row's first, and each behind a proposed token that was drawn."""
    firsts: list[int] = []
    further: list[list[int]] = []
    numbers: dict[int, int] = {}  # first draw of a row → number of the row
    at = 0
    for number, row in enumerate(rows):
        numbers[at] = number
        first, *rest = drawn.token_ids[at : at + 1 + len(row.proposed)]
        pairs = zip(row.proposed, (first, *rest), strict=False)
        wrong = next((i for i, (guess, token_id) in enumerate(pairs) if guess != token_id), len(row.proposed))
        firsts.append(first)
        further.append(rest[:wrong])
        at += 1 + len(row.proposed)
    logprobs = {numbers[at]: told for at, told in drawn.logprobs.items()}
    return drawn._replace(token_ids=firsts, logprobs=logprobs, further=tuple(further))


class Speculation:
    """At most `most` tokens are proposed for a sequence. `reserve(sequence, n)` gives a sequence pages for its first
    n tokens; False where there are too few."""

    def __init__(self, most: int, reserve: Callable[[Sequence, int], bool]) -> None:
        self._most = most
        self._reserve = reserve
        self.num_proposed = self.num_accepted = 0  # tokens

    def propose(self, rows: Mapping[Sequence, int], budget: int) -> dict[Sequence, tuple[int, ...]]:
        """Tokens to be computed behind the last one of each sequence; they get the pages for it. `rows`: tokens that
        each sequence computes in the plan; `budget`: tokens that the step has room for."""
        proposed: dict[Sequence, tuple[int, ...]] = {}
        few = 0 < 2 * len(rows) <= STEP_TOKENS
        if not self._most or not few or any(one.num_pending != 1 for one in rows):
            return proposed
        room = min(STEP_TOKENS - len(rows), budget)
        for place, sequence in enumerate(rows):
            tokens = self._guess(sequence, room // (len(rows) - place))
            if tokens and self._reserve(sequence, len(sequence.token_ids) + len(tokens)):
                proposed[sequence] = tokens
                room -= len(tokens)
        return proposed

    def _guess(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        most = min(most, self._most, sequence.num_wanted - 1)  # the last token it may draw is never computed
        if most < 1 or not _draws_alone(sequence):
            return ()
        if sequence.proposer is None:
            sequence.proposer = NgramProposer()
        return sequence.proposer.propose(sequence.token_ids, most)

    def settle(self, row: Row, num_accepted: int) -> None:
        """What became of a row's proposed tokens, once it has taken what it drew."""
        if row.proposed and row.sequence.proposer is not None:
            num_proposed = len(row.proposed)
            self.num_proposed += num_proposed
            self.num_accepted += num_accepted
            row.sequence.proposer.observe(len(row.sequence.token_ids), num_proposed, num_accepted)

    def counters(self) -> dict[str, int | float]:
        """By name, for `Engine.stats`."""
        return {"num_draft_tokens": self.num_proposed, "num_accepted_tokens": self.num_accepted}


def _draws_alone(sequence: Sequence) -> bool:
    """Whether a draw behind a guess takes that draw's logits and nothing else: no counts of the tokens before it, and
    nobody asks how likely it was."""
    asks = sequence.rules is not None or sequence.request.sampling.logprobs is not None
    return not asks and decodes_freely(sequence)
