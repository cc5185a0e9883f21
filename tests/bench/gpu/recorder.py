"""Recorder: which steps an engine has executed.

Owns a wrapper around `runner.run` that writes down a few integers per row, and its own cost. Knows neither tensors
nor time bounds (`roofline`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from engine.engine import Engine
from engine.plan import Draws, Plan
from tests.bench.gpu.roofline import Row


class Recorder:
    """From the beginning of a `with` block to its end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._run = engine.runner.run
        # of each plan: tokens, computed tokens and known tokens of each row, and how often the rows run
        self._plans: list[tuple[list[int], list[int], list[int], int]] = []
        self.seconds = 0.0  # that recording took

    def __enter__(self) -> Recorder:
        self._engine.runner.run = self._recorded  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.runner.run = self._run  # type: ignore[method-assign]

    @property
    def num_steps(self) -> int:
        return sum(num_steps for *_, num_steps in self._plans)

    def steps(self) -> Iterator[list[Row]]:
        """The rows of each step, in the order of the steps. Of several in one plan each is its own."""
        for tokens, computed, known, num_steps in self._plans:
            rows = [Row(t, c, t + c == k) for t, c, k in zip(tokens, computed, known, strict=True)]
            yield rows
            for later in range(1, num_steps):
                yield [Row(1, row.context + later - 1, True) for row in rows if row.samples]

    def _recorded(self, plan: Plan) -> Draws:
        start = time.perf_counter()
        sequences = [row.sequence for row in plan.rows]
        if sequences:
            self._plans.append(
                (
                    [row.num_tokens for row in plan.rows],
                    [sequence.num_computed for sequence in sequences],
                    [len(sequence.token_ids) for sequence in sequences],
                    getattr(plan, "num_steps", 1),
                )
            )
        self.seconds += time.perf_counter() - start
        return self._run(plan)
