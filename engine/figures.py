"""Figures: what an engine has done since it was loaded, and at what rate.

Owns the counters that `Engine.stats` shows and the measured cost of computing a prompt. Knows no request and no page:
it is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.request import Completion

PROMPT_STEP = 64  # tokens from which on a step's time says what computing a prompt costs


@dataclass(slots=True)
class Figures:
    num_steps: int = 0
    busy_seconds: float = 0.0
    num_prompt_tokens: int = 0  # of all requests added
    num_cached_tokens: int = 0  # of those that ended: what needed no computing
    num_generated_tokens: int = 0
    num_computed_tokens: int = 0  # recompute included
    num_finished: int = 0
    seconds_per_token: float | None = None  # of steps that compute prompts

    def took(self, seconds: float, num_tokens: int, num_drawn: int) -> None:
        """A step of so many tokens, of whose rows so many drew one."""
        self.num_steps += 1
        self.busy_seconds += seconds
        self.num_computed_tokens += num_tokens
        self.num_generated_tokens += num_drawn
        if num_tokens >= PROMPT_STEP:
            rate, before = seconds / num_tokens, self.seconds_per_token
            self.seconds_per_token = rate if before is None else 0.9 * before + 0.1 * rate

    def ended(self, completions: Iterable[Completion]) -> None:
        for completion in completions:
            self.num_finished += 1
            self.num_cached_tokens += completion.num_cached_tokens

    def counters(self) -> dict[str, int | float]:
        """By name, for `Engine.stats`."""
        return {
            "num_steps": self.num_steps,
            "busy_seconds": self.busy_seconds,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_generated_tokens": self.num_generated_tokens,
            "num_computed_tokens": self.num_computed_tokens,
            "num_finished": self.num_finished,
        }
