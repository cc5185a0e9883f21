"""Schemas: the objects that clients see. OpenAI's names where OpenAI has the object, ours for the job.

Owns the shape of answers and nothing of their making. Times are whole unix seconds. What a batch cannot have
(files, a completion window) is null, so that the official SDKs read it all the same.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from jobs.files import FileView
from jobs.forecasts import Outlook
from jobs.reads import BatchView, JobView
from jobs.states import BatchState, JobState

UNKNOWN: Final = Outlook()  # of what nobody asked for


class _Object(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class TopLogprob(_Object):
    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(_Object):
    """OpenAI's object of a chat's choice, for prompts alike: one entry per generated token."""

    content: list[TokenLogprob]
    refusal: None = None


class Output(_Object):
    index: int
    text: str
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: Logprobs | None = None


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
    estimated_completion_at: int | None  # of an open job, when anything is known
    unserved_models: list[str] | None  # of an open job: its model, if no live worker serves it
    outputs: list[Output] | None
    usage: JobUsage | None
    error: JobError | None
    attempts: int
    retry_of: str | None = None  # the job that this one is once more
    tier: Literal["interactive", "urgent", "normal", "background"]
    priority: int
    not_before: int | None
    deadline: int | None


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


class LineError(_Object):
    code: str
    line: int | None
    message: str
    param: str | None


class LineErrors(_Object):
    object: Literal["list"] = "list"
    data: list[LineError]


class BatchObject(_Object):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: LineErrors | None = None
    model: str | None = None
    input_file_id: str | None = None
    completion_window: str | None = None
    status: BatchState
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None
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
    retry_of: str | None = None  # ours: the batch whose failed jobs these are once more
    metadata: dict[str, str]
    estimated_completion_at: int | None  # ours: while it runs, when anything is known
    unserved_models: list[str] | None  # ours: that it waits for while it runs, and no live worker serves
    schedule_id: str | None  # ours: whose run it is


class ModelObject(_Object):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nightpress"


class ModelList(_Object):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class BatchList(_Object):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileObject(_Object):
    """OpenAI's object. `status` is always processed: a file that exists is whole."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(_Object):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(_Object):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ErrorBody(_Object):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorObject(_Object):
    error: ErrorBody


# Of every route: what is refused, and what fails: the database is away (503), an error of ours (500).
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorObject},
    "5XX": {"model": ErrorObject},
}


def job_object(job: JobView, outlook: Outlook = UNKNOWN) -> JobObject:
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
        **_outlook(outlook),
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
        retry_of=job.retry_of,
        tier=job.tier.name.lower(),
        priority=job.priority,
        not_before=_seconds(job.not_before),
        deadline=_seconds(job.deadline),
    )


def job_list(jobs: list[JobView], outlooks: list[Outlook], has_more: bool) -> JobList:
    return JobList(
        data=[job_object(job, outlook) for job, outlook in zip(jobs, outlooks, strict=True)],
        first_id=jobs[0].id if jobs else None,
        last_id=jobs[-1].id if jobs else None,
        has_more=has_more,
    )


def batch_object(batch: BatchView, outlook: Outlook = UNKNOWN) -> BatchObject:
    ended: dict[str, Any] = {}
    if batch.state in (BatchState.COMPLETED, BatchState.CANCELLED, BatchState.FAILED, BatchState.EXPIRED):
        ended[f"{batch.state}_at"] = _seconds(batch.finished_at)
    counts = {state: batch.counts.get(state, 0) for state in JobState}
    of_file = batch.input_file_id is not None
    # Lines for which the time ran out, or the file was lost, before they were jobs; cancelled ones do not count.
    too_late = of_file and batch.state in (BatchState.EXPIRED, BatchState.FAILED)
    unmade = batch.total - batch.num_inserted if too_late else 0
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        status=batch.state,
        created_at=int(batch.created_at),
        in_progress_at=_seconds(batch.in_progress_at if of_file else batch.created_at),
        errors=None if batch.errors is None else LineErrors(data=[LineError(**one) for one in batch.errors]),
        model=batch.model,
        input_file_id=batch.input_file_id,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        completion_window=batch.completion_window,
        expires_at=_seconds(batch.expires_at),
        finalizing_at=_seconds(batch.finalizing_at),
        cancelling_at=_seconds(batch.cancelling_at),
        request_counts=RequestCounts(
            total=batch.total,
            completed=counts[JobState.COMPLETED],
            failed=counts[JobState.FAILED] + counts[JobState.EXPIRED] + unmade,
        ),
        job_counts=counts,
        usage=BatchUsage(
            input_tokens=batch.usage.prompt,
            input_tokens_details=CachedTokens(cached_tokens=batch.usage.cached),
            output_tokens=batch.usage.completion,
            output_tokens_details=ReasoningTokens(reasoning_tokens=0),
            total_tokens=batch.usage.prompt + batch.usage.completion,
        ),
        retry_of=batch.retry_of,
        metadata=batch.metadata,
        **_outlook(outlook),
        schedule_id=batch.schedule_id,
        **ended,
    )


def _outlook(outlook: Outlook) -> dict[str, Any]:
    end, unserved = outlook
    return {
        "estimated_completion_at": None if end is None else math.ceil(end),
        "unserved_models": None if unserved is None else list(unserved),
    }


def batch_list(batches: list[BatchView], has_more: bool) -> BatchList:
    return BatchList(
        data=[batch_object(batch) for batch in batches],
        first_id=batches[0].id if batches else None,
        last_id=batches[-1].id if batches else None,
        has_more=has_more,
    )


def file_object(file: FileView) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=_seconds(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
    )


def file_list(files: list[FileView], has_more: bool) -> FileList:
    return FileList(
        data=[file_object(file) for file in files],
        first_id=files[0].id if files else None,
        last_id=files[-1].id if files else None,
        has_more=has_more,
    )


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
