"""Terms: when, how eagerly and how often a submit's jobs are to be run.

Owns the frozen value that every door hands to `jobs.job_rows`, and how a job's row keeps it. Refuses to know how a
client spells it (`jobs.terms_body`), the order in which a claim takes jobs (`jobs.claims`, `jobs.fair_tags`) and what
happens when a moment has come (`jobs.deadlines`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final


class Tier(IntEnum):
    """Lower goes first, always."""

    INTERACTIVE = 0  # somebody waits for the answer
    URGENT = 1  # its deadline is at risk
    NORMAL = 2
    BACKGROUND = 3  # fills what would be idle, and yields


# Added to the tier of a queued job that may not start yet: no claim looks there, and the tier is not forgotten.
DELAYED: Final = 10


def tier_of(stored: int) -> Tier:
    """The tier of a row, whether its job may start or not."""
    return Tier(stored % DELAYED)


BACKOFF_SECONDS: Final = 10.0
MAX_BACKOFF_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often a job may be tried in all, when it failed for a passing reason (`jobs.outcomes.PASSING`), and the
    seconds between: `backoff_seconds` doubled with each failure, `max_backoff_seconds` at most."""

    max_attempts: int = 1
    backoff_seconds: float = BACKOFF_SECONDS
    max_backoff_seconds: float = MAX_BACKOFF_SECONDS

    def delay(self, num_failures: int) -> float:
        """Seconds from the failure of that number, from 1, to the next attempt."""
        return min(self.backoff_seconds * 2.0 ** (num_failures - 1), self.max_backoff_seconds)

    def stored(self) -> dict[str, Any]:
        return {
            "max_attempts": self.max_attempts,
            "backoff_seconds": self.backoff_seconds,
            "max_backoff_seconds": self.max_backoff_seconds,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Times in unix seconds. Each step of `priority`, from -4 to 4, doubles the share of the machines that its
    tenant's jobs of this priority have beside those of others. A job that has not ended by `deadline` expires;
    before `not_before` it does not start."""

    tier: Tier = Tier.NORMAL
    priority: int = 0
    not_before: float | None = None
    deadline: float | None = None
    retry: Retry | None = None

    def columns(self) -> dict[str, Any]:
        """As `models.Job` stores them."""
        return {
            "tier": int(self.tier) + (0 if self.not_before is None else DELAYED),
            "priority": self.priority,
            "not_before": self.not_before,
            "deadline": self.deadline,
            "retry": None if self.retry is None else self.retry.stored(),
        }


ORDINARY: Final = Terms()
