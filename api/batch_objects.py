"""Objects of batches, as clients see them: OpenAI's, with some fields of ours.

Owns the shape of answers and nothing of their making. What a batch cannot have (files, a completion window) is null,
so that the official SDKs read it all the same.
"""

from __future__ import annotations

from typing import Any, Literal

from api.schemas import (
    UNKNOWN,
    CachedTokens,
    Named,
    Object,
    PageObject,
    ReasoningTokens,
    seen_ahead,
    whole_seconds,
)
from jobs.batch_reads import BatchView
from jobs.forecasts import Outlook
from jobs.states import BatchState, JobState


class RequestCounts(Object):
    """OpenAI's three numbers. `failed` includes expired jobs; cancelled ones only count towards `total`."""

    total: int
    completed: int
    failed: int


class BatchUsage(Object):
    """Billed tokens, under the names of OpenAI's batch object."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class LineError(Object):
    code: str
    line: int | None
    message: str
    param: str | None


class LineErrors(Object):
    object: Literal["list"] = "list"
    data: list[LineError]


class BatchObject(Named):
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


class BatchList(PageObject[BatchObject]):
    pass


def batch_object(batch: BatchView, outlook: Outlook = UNKNOWN) -> BatchObject:
    ended: dict[str, Any] = {}
    if batch.state in (BatchState.COMPLETED, BatchState.CANCELLED, BatchState.FAILED, BatchState.EXPIRED):
        ended[f"{batch.state}_at"] = whole_seconds(batch.finished_at)
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
        in_progress_at=whole_seconds(batch.in_progress_at if of_file else batch.created_at),
        errors=None if batch.errors is None else LineErrors(data=[LineError(**one) for one in batch.errors]),
        model=batch.model,
        input_file_id=batch.input_file_id,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        completion_window=batch.completion_window,
        expires_at=whole_seconds(batch.expires_at),
        finalizing_at=whole_seconds(batch.finalizing_at),
        cancelling_at=whole_seconds(batch.cancelling_at),
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
        **seen_ahead(outlook),
        schedule_id=batch.schedule_id,
        **ended,
    )
