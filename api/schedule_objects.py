"""Objects of schedules and their runs, as clients see them. Times are whole unix seconds.

Owns the shape of answers and nothing of their making.
"""

from __future__ import annotations

from typing import Any, Literal

from api.schemas import JobError, Named, PageObject, whole_seconds
from jobs.schedule_body import Missed
from jobs.schedule_runs import RunKind, RunView
from jobs.schedules import ScheduleView


class ScheduleObject(Named):
    object: Literal["schedule"] = "schedule"
    name: str
    cron: str
    time_zone: str
    enabled: bool
    missed: Missed
    completion_window: str | None
    num_jobs: int
    metadata: dict[str, str]
    next_run_at: int | None
    created_at: int
    updated_at: int
    deleted_at: int | None
    jobs: list[dict[str, Any]] | None = None  # when they were asked for


class RunObject(Named):
    object: Literal["schedule_run"] = "schedule_run"
    schedule_id: str
    kind: RunKind
    fire_time: int
    status: Literal["started", "refused"]
    batch_id: str | None
    error: JobError | None
    created_at: int


class ScheduleList(PageObject[ScheduleObject]):
    pass


class RunList(PageObject[RunObject]):
    pass


def schedule_object(schedule: ScheduleView, jobs: list[dict[str, Any]] | None = None) -> ScheduleObject:
    return ScheduleObject(
        id=schedule.id,
        name=schedule.name,
        cron=schedule.cron,
        time_zone=schedule.time_zone,
        enabled=schedule.enabled,
        missed=schedule.missed,
        completion_window=schedule.completion_window,
        num_jobs=schedule.num_jobs,
        metadata=schedule.metadata,
        next_run_at=whole_seconds(schedule.next_at),
        created_at=int(schedule.created_at),
        updated_at=int(schedule.updated_at),
        deleted_at=whole_seconds(schedule.deleted_at),
        jobs=jobs,
    )


def run_object(run: RunView) -> RunObject:
    return RunObject(
        id=run.id,
        schedule_id=run.schedule_id,
        kind=run.kind,
        fire_time=int(run.fire_time),
        status="started" if run.error is None else "refused",
        batch_id=run.batch_id,
        error=None if run.error is None else JobError.model_validate(run.error),
        created_at=int(run.created_at),
    )
