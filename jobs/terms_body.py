"""Terms as clients spell them: the fields beside a job, or beside the jobs of a batch, the same at every door.

Owns the names, their ranges and every refusal. They are no part of the job's own body: a job that is tried again
later must not bring a deadline along that has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from jobs.bad_field import BadField, Strict, validated
from jobs.completion_window import terms_of_window
from jobs.terms import BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, Retry, Terms, Tier

MAX_PRIORITY: Final = 4
LONGEST_SECONDS: Final = 366 * 86_400.0  # from now to the latest moment that can be meant
Moment = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Delay = Annotated[float, Field(ge=0.1, le=86_400, allow_inf_nan=False)]


class RetryBody(Strict):
    max_attempts: Annotated[int, Field(ge=1, le=20)]
    backoff_seconds: Delay = BACKOFF_SECONDS
    max_backoff_seconds: Delay = MAX_BACKOFF_SECONDS


class TermsBody(Strict):
    """null means the same as leaving a field out."""

    tier: Literal["normal", "background"] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    not_before: Moment | None = None
    deadline: Moment | None = None
    completion_window: str | None = None
    retry: RetryBody | None = None


TERM_FIELDS: Final = tuple(TermsBody.model_fields)
_MOMENTS: Final = {"not_before", "deadline", "completion_window"}


def split_terms(data: Mapping[str, Any], *, clock: Callable[[], float]) -> tuple[Terms, dict[str, Any]]:
    """The terms in `data`, and the rest of it. `clock`: the database's, in unix seconds; to ask it costs a way there,
    so it is asked only where a moment is given. Raises `BadField`."""
    given = {name: data[name] for name in TERM_FIELDS if data.get(name) is not None}
    rest = {name: value for name, value in data.items() if name not in TERM_FIELDS}
    return (_parse_terms(given, clock), rest) if given else (Terms(), rest)


def _parse_terms(data: dict[str, Any], clock: Callable[[], float]) -> Terms:
    """Raises `BadField` for the first thing that is wrong."""
    body = validated(TermsBody, data)
    time_now = clock() if data.keys() & _MOMENTS else 0.0
    deadline, tier = body.deadline, Tier.BACKGROUND if body.tier == "background" else Tier.NORMAL
    if body.completion_window is not None:
        if deadline is not None:
            raise BadField("completion_window", "give deadline or completion_window, not both")
        window = terms_of_window(body.completion_window, submitted_at=time_now)
        deadline, tier = window.deadline, max(window.tier, tier)
    for name, moment in (("deadline", deadline), ("not_before", body.not_before)):
        if moment is not None and moment > time_now + LONGEST_SECONDS:
            raise BadField(name, "must be unix seconds, at most 366 days from now")
    if deadline is not None:
        if deadline <= time_now:
            raise BadField("deadline", "must be unix seconds that are still to come")
        if tier is Tier.BACKGROUND:
            raise BadField(
                "deadline", "work of the background tier takes as long as it takes; give tier or deadline"
            )
        if body.not_before is not None and body.not_before >= deadline:
            raise BadField("not_before", "must come before the deadline")
    return Terms(
        tier=tier,
        priority=body.priority or 0,
        not_before=body.not_before if body.not_before is not None and body.not_before > time_now else None,
        deadline=deadline,
        retry=None if body.retry is None else Retry(**body.retry.model_dump()),
    )


def refuse_terms_inside(jobs: object) -> None:
    """Terms hold for all jobs of an array. Raises `BadField` for one that has its own."""
    for index, job in enumerate(jobs if isinstance(jobs, list) else ()):
        if isinstance(job, dict) and (own := next((name for name in TERM_FIELDS if name in job), None)):
            raise BadField(
                f"jobs[{index}].{own}",
                "belongs beside jobs, where it holds for all of them",
                "misplaced_parameter",
            )
