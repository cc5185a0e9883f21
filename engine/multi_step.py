"""MultiStep: how many steps of decoding may go in one plan, and which plan may go behind one that still runs.

Owns these two choices. On a GPU the host costs as much as a small step does, so rows that need nothing of it between
two tokens decode several: their tokens stay on the device and come back together. And while such a plan runs, the
next one for the same rows is launched behind it, before anybody has read what the first drew: the device never waits.
What is computed for a sequence behind its end is thrown away; ends that are known beforehand (`max_tokens`) decide
how long a run may be. After the multi-step scheduling of vLLM 0.6 (2024). Knows no tensors (`decode_steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items

from engine.logit_rules import MOST_COUNTED, LogitRules
from engine.pages import PagePool
from engine.plan import Plan
from engine.sequence import Sequence

MOST_WASTED = 1 / 16  # of the steps of a plan's rows, behind ends that are known: there a row costs little
FEWEST_ALIVE = 1 / 2  # of a plan's rows: with fewer a smaller plan is made


def decodes_freely(sequence: Sequence) -> bool:
    """Whether its next tokens are drawn from the logits by numbers that the device has or can count, and nothing is
    asked about them but how likely each was: so several can be drawn before the first of them is read."""
    sampling = sequence.request.sampling
    return (
        not sampling.logprobs
        and (sequence.rules is None or _counted(sequence, sequence.rules))
        and sequence.matcher is None
        and sequence.num_generated >= sampling.min_tokens
    )


def _counted(sequence: Sequence, rules: LogitRules) -> bool:
    """Whether its tokens can be counted where they are drawn."""
    return rules.only_penalise and len(sequence.token_ids) <= MOST_COUNTED


def steps_together(rows: Mapping[Sequence, int], most: int) -> int:
    """At most `most`, a power of two less each time; 1 where some row must be looked at. `rows`: tokens that each
    sequence computes in the plan."""
    if most == 1 or any(count != 1 or one.num_pending != 1 for one, count in rows.items()):
        return 1
    return _worthwhile([one.num_wanted for one in rows], most) if all(map(decodes_freely, rows)) else 1


def _worthwhile(wanted: list[int], most: int) -> int:
    """At most `most` steps for rows that will take so many tokens each."""
    while most > 1 and sum(most - count for count in wanted if count < most) > MOST_WASTED * most * len(
        wanted
    ):
        most //= 2
    return most


class MultiStep:
    """`reserve(sequence, n)` gives a sequence pages for its first n tokens; False where there are too few."""

    def __init__(self, pool: PagePool, most_steps: int, reserve: Callable[[Sequence, int], bool]) -> None:
        self._pool = pool
        self._most_steps = most_steps
        self._reserve = reserve

    def together(self, rows: Mapping[Sequence, int]) -> int:
        """How many steps these rows take in one go. They get the pages for it."""
        steps = steps_together(rows, self._most_steps)
        while steps > 1 and not self._cover(list(rows), steps):
            steps //= 2
        return steps

    def behind(self, plan: Plan, running: Items[Sequence]) -> Plan | None:
        """A plan for the rows of `plan`, which runs, and for nobody else; its rows get the pages. None where that
        cannot be or does not pay. Rows that have ended meanwhile keep their places, to no end."""
        if plan.num_steps == 1:
            return None
        alive = set(running).intersection(row.sequence for row in plan.rows)
        if len(alive) < len(running) or len(alive) < FEWEST_ALIVE * len(plan.rows):
            return None
        if not all(map(decodes_freely, alive)):
            return None
        wanted = [max(0, one.num_wanted - plan.num_steps) for one in alive]
        steps = _worthwhile(wanted, self._most_steps)
        if steps == 1 or not self._cover(list(alive), plan.num_steps + steps):
            return None
        return Plan(plan.rows, num_steps=steps, behind=plan.num_steps)

    def _cover(self, sequences: list[Sequence], steps: int) -> bool:
        """Give all of them the pages for so many steps, or nobody any."""
        covered = [one.num_computed + min(steps, one.num_wanted) for one in sequences]
        each = zip(sequences, covered, strict=True)
        missing = sum(max(0, self._pool.pages_for(count) - len(one.pages)) for one, count in each)
        if missing > self._pool.num_available:
            return False
        for one, count in zip(sequences, covered, strict=True):
            self._reserve(one, count)
        return True
