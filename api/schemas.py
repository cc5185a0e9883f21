"""Schemas: the objects that clients see. OpenAI's names where OpenAI has the object, ours for the job.

Owns the shape of answers and nothing of their making. Times are whole unix seconds. What a batch cannot have
(files, a completion window) is null, so that the official SDKs read it all the same.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from jobs.reads import BatchView, JobView
from jobs.states import BatchState, JobState


class _Object(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Output(_Object):
    index: int
    text: str
    finish_reason: str
    stop_reason: str | int | None = None


class CachedTokens(_Object):
    cached_tokens: int


class ReasoningTokens(_Object):
    reasoning_tokens: int


class JobUsage(_Object):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class JobError(_Object):
    code: str
    message: str
    param: str | None = None


class JobObject(_Object):
    id: str
    object: Literal["job"] = "job"
    status: JobState
    model: str
    batch_id: str | None
    custom_id: str | None
    metadata: dict[str, str]
    created_at: int
    started_at: int | None
    finished_at: int | None
    outputs: list[Output] | None
    usage: JobUsage | None
    error: JobError | None
    attempts: int


class JobList(_Object):
    object: Literal["list"] = "list"
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class RequestCounts(_Object):
    """OpenAI's three numbers. `failed` includes expired jobs; cancelled ones only count towards `total`."""

    total: int
    completed: int
    failed: int


class BatchUsage(_Object):
    """Billed tokens, under the names of OpenAI's batch object."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class BatchObject(_Object):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: None = None
    input_file_id: str | None = None
    completion_window: str | None = None
    status: BatchState
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    job_counts: dict[JobState, int]  # ours: one number per state, zeros included
    usage: BatchUsage
    metadata: dict[str, str]


class ErrorBody(_Object):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorObject(_Object):
    error: ErrorBody


def job_object(job: JobView) -> JobObject:
    usage = job.usage
    return JobObject(
        id=job.id,
        status=job.state,
        model=job.model,
        batch_id=job.batch_id,
        custom_id=job.custom_id,
        metadata=job.metadata,
        created_at=int(job.created_at),
        started_at=_seconds(job.started_at),
        finished_at=_seconds(job.finished_at),
        outputs=None if job.outputs is None else [Output.model_validate(one) for one in job.outputs],
        usage=None
        if usage is None
        else JobUsage(
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            total_tokens=usage.prompt + usage.completion,
            prompt_tokens_details=CachedTokens(cached_tokens=usage.cached),
        ),
        error=None if job.error is None else JobError.model_validate(job.error),
        attempts=job.attempts,
    )


def job_list(jobs: list[JobView], has_more: bool) -> JobList:
    return JobList(
        data=[job_object(job) for job in jobs],
        first_id=jobs[0].id if jobs else None,
        last_id=jobs[-1].id if jobs else None,
        has_more=has_more,
    )


def batch_object(batch: BatchView) -> BatchObject:
    ended: dict[str, Any] = {}
    if batch.state in (BatchState.COMPLETED, BatchState.CANCELLED, BatchState.FAILED, BatchState.EXPIRED):
        ended[f"{batch.state}_at"] = _seconds(batch.finished_at)
    counts = {state: batch.counts.get(state, 0) for state in JobState}
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        status=batch.state,
        created_at=int(batch.created_at),
        in_progress_at=int(batch.created_at),
        cancelling_at=_seconds(batch.cancelling_at),
        request_counts=RequestCounts(
            total=batch.total,
            completed=counts[JobState.COMPLETED],
            failed=counts[JobState.FAILED] + counts[JobState.EXPIRED],
        ),
        job_counts=counts,
        usage=BatchUsage(
            input_tokens=batch.usage.prompt,
            input_tokens_details=CachedTokens(cached_tokens=batch.usage.cached),
            output_tokens=batch.usage.completion,
            output_tokens_details=ReasoningTokens(reasoning_tokens=0),
            total_tokens=batch.usage.prompt + batch.usage.completion,
        ),
        metadata=batch.metadata,
        **ended,
    )


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
