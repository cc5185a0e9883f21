"""Flight: plans on their way through the device, the next one launched before the last one's draws are read.

Owns the plan that was launched ahead, what its draws mean for sequences that have gone meanwhile (nothing), and what
becomes of a plan that the device has no memory for: smaller ones, one by one. Who took the memory, another process
perhaps, may give it back: after some plans without a shortage twice as much is dared, after a try that failed later
than before. So of `PATIENCE` plans at most one, and one launched ahead, are in vain. Knows neither pages nor tensors.

Whatever happens to a sequence between two steps, its pages may be given to others at once: the device works in the
order of launches, so whoever gets them writes to them later.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Protocol

from engine.plan import Draws, Launched, OutOfDeviceMemory, Plan
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step_times import StepTimes

logger = logging.getLogger(__name__)

LEAST_BUDGET = 16  # tokens of a step: who has no memory for so few has none
PATIENCE = 256  # plans without a shortage after which more is dared
MOST_PATIENCE = 16 * PATIENCE  # where tries keep failing


class Launcher(Protocol):
    times: StepTimes

    def launch(self, plan: Plan) -> Launched:
        """Raises `OutOfDeviceMemory` where a smaller plan may do."""


class Flight:
    def __init__(self, runner: Launcher, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._ahead: tuple[Plan, Launched] | None = None
        self._room_ahead = True
        self._whole_budget = scheduler.max_num_batched_tokens
        self._patience = PATIENCE
        self._num_good = 0  # plans since the last shortage or try
        self._trying = False  # more than a shortage has left is dared, and not long proven

    def next(self) -> tuple[Plan, Draws] | None:
        """Make and launch a plan, or take the one that was launched ahead, and wait for what it draws. None where
        there is nothing to compute. A step of the runner's `times` starts here."""
        times = self._runner.times
        times.start()
        if self._ahead and not _alive(self._ahead[0], self._scheduler.running):
            self._ahead = None  # nobody waits for it
        if self._ahead is None:
            self._ahead = self._first()
        if self._ahead is None:
            return None
        plan, launched = self._ahead
        self._ahead = None
        times.begin("plan")
        following = self._scheduler.follow(plan) if self._room_ahead else None
        if following is not None:
            try:
                self._ahead = following, self._runner.launch(following)
            except OutOfDeviceMemory as error:  # its rows are planned again when this one is read
                self._room_ahead = False
                self._fell_short()
                logger.warning("no plan is launched ahead for now: %s", error)
        times.begin("wait")
        draws = launched()
        self._went_well()
        times.begin("answer")
        return _without_the_gone(plan, draws, self._scheduler.running) if plan.behind else (plan, draws)

    def _first(self) -> tuple[Plan, Launched] | None:
        """A plan behind nothing, launched. One that does not fit is made anew from half the tokens; of several steps
        those of one count, for a step takes the memory of the one before it. The smallest is tried twice: what was
        left may have lain in pieces."""
        tried = False
        while True:
            plan = self._scheduler.plan()
            if not plan.rows:
                return None
            try:
                return plan, self._runner.launch(plan)
            except OutOfDeviceMemory as error:
                at_once = plan.num_tokens // plan.num_steps
                if at_once <= LEAST_BUDGET:
                    if tried:
                        raise
                    tried = True
                    continue
                budget = max(at_once // 2, LEAST_BUDGET)
                self._scheduler.max_num_batched_tokens = budget
                self._fell_short()
                logger.warning("steps of at most %d tokens for now: %s", budget, error)

    def _fell_short(self) -> None:
        if self._trying:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        self._trying = False
        self._num_good = 0

    def _went_well(self) -> None:
        """One more plan. Sooner or later twice as much is dared, until all is as before any shortage."""
        is_less = not self._room_ahead or self._scheduler.max_num_batched_tokens < self._whole_budget
        if not is_less and not self._trying:
            return
        self._num_good += 1
        if self._num_good < self._patience:
            return
        self._num_good = 0
        self._trying = is_less
        if not is_less:
            self._patience = PATIENCE
            return
        self._room_ahead = True
        budget = min(2 * self._scheduler.max_num_batched_tokens, self._whole_budget)
        self._scheduler.max_num_batched_tokens = budget
        logger.info(
            "steps of up to %d tokens again, and plans ahead: %d without a shortage", budget, self._patience
        )


def _alive(plan: Plan, running: Collection[Sequence]) -> bool:
    here = set(running)
    return any(row.sequence in here for row in plan.rows)


def _without_the_gone(plan: Plan, draws: Draws, running: Collection[Sequence]) -> tuple[Plan, Draws]:
    """What is left of a plan of several steps. A sequence that has left the device did not come back since."""
    here = set(running)
    kept = [i for i, row in enumerate(plan.rows) if row.sequence in here]
    rows = tuple(plan.rows[i] for i in kept)
    return Plan(rows, num_steps=plan.num_steps), draws.only(kept)
