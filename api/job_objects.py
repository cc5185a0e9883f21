"""Objects of jobs, as clients see them: ours, with OpenAI's parts in it.

Owns the shape of answers and nothing of their making.
"""

from __future__ import annotations

from typing import Literal

from api.schemas import (
    UNKNOWN,
    CachedTokens,
    JobError,
    Named,
    Object,
    PageObject,
    ReasoningTokens,
    seen_ahead,
    whole_seconds,
)
from jobs.forecasts import Outlook
from jobs.openai_answers import reasoning_in
from jobs.reads import JobView
from jobs.states import JobState


class TopLogprob(Object):
    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(Object):
    """OpenAI's object of a chat's choice, for prompts alike: one entry per generated token."""

    content: list[TokenLogprob]
    refusal: None = None


class Output(Object):
    index: int
    text: str
    finish_reason: str
    stop_reason: str | int | None = None
    reasoning: str | None = None  # what the model thought before `text`, where it marks that
    logprobs: Logprobs | None = None


class JobUsage(Object):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class JobObject(Named):
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


class JobList(PageObject[JobObject]):
    pass


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
        started_at=whole_seconds(job.started_at),
        finished_at=whole_seconds(job.finished_at),
        **seen_ahead(outlook),
        outputs=None if job.outputs is None else [Output.model_validate(one) for one in job.outputs],
        usage=None
        if usage is None
        else JobUsage(
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            total_tokens=usage.prompt + usage.completion,
            prompt_tokens_details=CachedTokens(cached_tokens=usage.cached),
            completion_tokens_details=ReasoningTokens(reasoning_tokens=reasoning_in(job.outputs)),
        ),
        error=None if job.error is None else JobError.model_validate(job.error),
        attempts=job.attempts,
        retry_of=job.retry_of,
        tier=job.tier.name.lower(),
        priority=job.priority,
        not_before=whole_seconds(job.not_before),
        deadline=whole_seconds(job.deadline),
    )
