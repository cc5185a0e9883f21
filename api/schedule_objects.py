"""Objects of schedules and their runs, as clients see them. Times are whole unix seconds.

Owns the shape of answers and nothing of their making.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from api.schemas import JobError
from jobs.schedule_body import Missed
from jobs.schedule_runs import RunKind, RunView
from jobs.schedules import ScheduleView


class ScheduleObject(BaseModel):
    id: str
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


class RunObject(BaseModel):
    id: str
    object: Literal["schedule_run"] = "schedule_run"
    schedule_id: str
    kind: RunKind
    fire_time: int
    status: Literal["started", "refused"]
    batch_id: str | None
    error: JobError | None
    created_at: int


class ScheduleList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ScheduleObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class RunList(BaseModel):
    object: Literal["list"] = "list"
    data: list[RunObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


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
        next_run_at=None if schedule.next_at is None else int(schedule.next_at),
        created_at=int(schedule.created_at),
        updated_at=int(schedule.updated_at),
        deleted_at=None if schedule.deleted_at is None else int(schedule.deleted_at),
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


def schedule_list(schedules: list[ScheduleView], has_more: bool) -> ScheduleList:
    return ScheduleList(
        data=[schedule_object(one) for one in schedules],
        first_id=schedules[0].id if schedules else None,
        last_id=schedules[-1].id if schedules else None,
        has_more=has_more,
    )


def run_list(runs: list[RunView], has_more: bool) -> RunList:
    return RunList(
        data=[run_object(one) for one in runs],
        first_id=runs[0].id if runs else None,
        last_id=runs[-1].id if runs else None,
        has_more=has_more,
    )
