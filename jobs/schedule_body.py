"""ScheduleBody: what a client may ask of a schedule, when it is made and when it is changed.

Owns the fields and their refusals; what a cron line means is `jobs.cron_line`'s, what a job may say `jobs.body`'s.
Refuses to know HTTP and SQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import Field

from jobs.bad_field import BadField, Strict, validated
from jobs.body import JobBody, parse_jobs
from jobs.completion_window import window_seconds
from jobs.cron_line import CronLine
from jobs.settings import Settings
from jobs.texts import Metadata, Name


class Missed(StrEnum):
    """What becomes of the times at which nobody was there to fire."""

    SKIP = "skip"  # nothing: the next time in the future is the next one
    RUN_ONCE = "run_once"  # one run for all of them, as soon as somebody is there


DEFAULTS: Final[dict[str, Any]] = {
    "time_zone": "UTC",
    "enabled": True,
    "missed": Missed.SKIP,
    "completion_window": None,
    "metadata": {},
}
REQUIRED: Final = ("name", "cron", "jobs")


class ScheduleFields(Strict):
    name: Annotated[Name, Field(min_length=1, max_length=255)] | None = None
    cron: Name | None = None
    time_zone: Name | None = None
    enabled: bool | None = None
    missed: str | None = None
    completion_window: str | None = None
    jobs: list[Any] | None = None
    metadata: Metadata | None = None


def parse_schedule(data: object, settings: Settings) -> dict[str, Any]:
    """Columns of a new `models.Schedule` that its client decides; `jobs` as `JobBody`. Raises `BadField`."""
    given = _given(data)
    for name in REQUIRED:
        if given.get(name) is None:
            raise BadField(name, "is required", "missing_required_parameter")
    columns = DEFAULTS | {name: value for name, value in given.items() if value is not None}
    CronLine.of(columns["cron"], columns["time_zone"])
    return _checked(columns, settings)


def parse_change(data: object, settings: Settings) -> dict[str, Any]:
    """The same for a change: only what is given. null takes a field back to its default. Raises `BadField`.

    Whether cron line and time zone fit is not known here, where one of them may be missing.
    """
    given = _given(data)
    if not given:
        raise BadField(None, "names nothing to change", "missing_required_parameter")
    for name in REQUIRED:
        if name in given and given[name] is None:
            raise BadField(name, "must not be null", "invalid_type")
    return _checked(
        {
            name: DEFAULTS[name] if value is None and name in DEFAULTS else value
            for name, value in given.items()
        },
        settings,
    )


def _given(data: object) -> dict[str, Any]:
    if isinstance(data, dict) and "input_file_id" in data:
        raise BadField("input_file_id", "is not supported yet; give the jobs", "unknown_parameter")
    return validated(ScheduleFields, data, "schedule").model_dump(exclude_unset=True)


def _checked(columns: dict[str, Any], settings: Settings) -> dict[str, Any]:
    if "missed" in columns and columns["missed"] not in list(Missed):
        raise BadField("missed", f"must be {' or '.join(Missed)}")
    if columns.get("completion_window") is not None:
        window_seconds(columns["completion_window"])
    if "jobs" in columns:
        columns["jobs"] = parse_jobs(columns["jobs"], settings)
    return columns


def stored_jobs(bodies: list[JobBody]) -> list[dict[str, Any]]:
    """As `models.Schedule.jobs` keeps them."""
    return [body.stored() for body in bodies]


def bodies_of(stored: Sequence[dict[str, Any]]) -> list[JobBody]:
    """The way back."""
    return [JobBody.model_validate(job) for job in stored]
