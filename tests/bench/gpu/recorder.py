"""Recorder: which steps an engine has executed.

Owns a wrapper around `runner.launch` that writes down a few integers per row, and its own cost. Knows neither tensors
nor time bounds (`roofline`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from engine.engine import Engine
from engine.plan import Launched, Plan
from tests.bench.gpu.roofline import Row


class Recorded(NamedTuple):
    """Of one plan, by row: tokens, tokens computed before, those that are known, steps in which it is computed."""

    tokens: list[int]
    computed: list[int]
    known: list[int]
    steps: list[int]
    num_steps: int


class Recorder:
    """From the beginning of a `with` block to its end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._launch = engine.runner.launch
        self._plans: list[Recorded] = []
        self.seconds = 0.0  # that recording took

    def __enter__(self) -> Recorder:
        self._engine.runner.launch = self._recorded  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.runner.launch = self._launch  # type: ignore[method-assign]

    @property
    def num_steps(self) -> int:
        return sum(plan.num_steps for plan in self._plans)

    def steps(self) -> Iterator[list[Row]]:
        """The rows of each step, in the order of the steps. Of several in one plan each is its own, with the rows
        that have not reached their last token."""
        for plan in self._plans:
            if plan.num_steps == 1:
                each = zip(plan.tokens, plan.computed, plan.known, strict=True)
                yield [Row(t, c, t + c == k) for t, c, k in each]
                continue
            for step in range(plan.num_steps):
                each_row = zip(plan.computed, plan.steps, strict=True)
                yield [Row(1, c + step, True) for c, steps in each_row if step < steps]

    def _recorded(self, plan: Plan) -> Launched:
        start = time.perf_counter()
        if plan.rows:
            sequences = [row.sequence for row in plan.rows]
            self._plans.append(
                Recorded(
                    [row.num_tokens for row in plan.rows],
                    [one.num_computed + plan.behind for one in sequences],
                    [len(one.token_ids) for one in sequences],
                    [one.num_wanted - plan.behind if one.pages else 0 for one in sequences],
                    plan.num_steps,
                )
            )
        self.seconds += time.perf_counter() - start
        return self._launch(plan)
