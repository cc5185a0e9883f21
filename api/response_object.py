"""OpenAI's `response` object, made of a job.

Owns its shape and the words for a job's state. A response is named like its job, so that no table has to remember it;
what it was asked with is read off the job's body, where `instructions` are the system message that begins the chat.
"""

from __future__ import annotations

from typing import Any, Final

from engine.sampling_params import SamplingParams
from jobs.failures import failure_of
from jobs.openai_answers import reasoning_in
from jobs.reads import JobView
from jobs.states import JobState
from jobs.template_kwargs import EFFORT
from jobs.terms import Tier

PREFIX: Final = "resp_"
_PLAIN: Final = SamplingParams()  # what a body leaves out
_STATUS: Final = {
    JobState.QUEUED: "queued",
    JobState.IN_PROGRESS: "in_progress",
    JobState.CANCELLING: "cancelled",  # nothing comes of it any more
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
    JobState.EXPIRED: "failed",
}


def id_of(job_id: str) -> str:
    return PREFIX + job_id.removeprefix("job_")


def job_id_of(response_id: str) -> str | None:
    """None for what is no id of a response."""
    name = response_id.removeprefix(PREFIX)
    return None if name == response_id else "job_" + name


def response_object(job: JobView, body: dict[str, Any]) -> dict[str, Any]:
    """`body`: what the job asks for, as it is stored. An answer that its length has cut is `incomplete`."""
    outputs = job.outputs or []
    cut = any(output["finish_reason"] == "length" for output in outputs)
    failure = failure_of(job) if _STATUS[job.state] == "failed" else None
    return {
        "id": id_of(job.id),
        "object": "response",
        "created_at": int(job.created_at),
        "completed_at": None if job.finished_at is None else int(job.finished_at),
        "status": "incomplete" if cut else _STATUS[job.state],
        "background": job.tier is not Tier.INTERACTIVE,  # nobody waited for it
        "error": failure
        and {
            "code": "invalid_prompt" if failure.status < 500 else "server_error",
            "message": f"{failure.code}: {failure.message}",
        },
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": _instructions(body.get("messages")),
        "max_output_tokens": body.get("max_completion_tokens", body.get("max_tokens")),
        "metadata": job.metadata,
        "model": job.model,
        "output": [item for output in outputs for item in (*_reasoning(job, output), _message(job, output))],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "reasoning": {"effort": (body.get("chat_template_kwargs") or {}).get(EFFORT), "summary": None},
        "store": True,
        "temperature": body.get("temperature", _PLAIN.temperature),
        "text": {"format": _format(body.get("response_format"))},
        "tool_choice": "none",
        "tools": [],
        "top_p": body.get("top_p", _PLAIN.top_p),
        "truncation": "disabled",
        "usage": _usage(job),
    }


def _reasoning(job: JobView, output: dict[str, Any]) -> list[dict[str, Any]]:
    """Nothing where the model did not reason."""
    if "reasoning" not in output:
        return []
    return [
        {
            "id": f"rs_{job.id.removeprefix('job_')}{output['index'] or ''}",
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": output["reasoning"]}],
        }
    ]


def _instructions(messages: list[dict[str, str]] | None) -> str | None:
    return messages[0]["content"] if messages and messages[0]["role"] == "system" else None


def _message(job: JobView, output: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{job.id.removeprefix('job_')}{output['index'] or ''}",
        "type": "message",
        "role": "assistant",
        "status": "incomplete" if output["finish_reason"] == "length" else "completed",
        "content": [{"type": "output_text", "text": output["text"], "annotations": [], "logprobs": []}],
    }


def _format(form: dict[str, Any] | None) -> dict[str, Any]:
    if form is None:
        return {"type": "text"}
    return {"type": form["type"]} | (form.get("json_schema") or {})


def _usage(job: JobView) -> dict[str, Any] | None:
    if job.usage is None:
        return None
    return {
        "input_tokens": job.usage.prompt,
        "input_tokens_details": {"cached_tokens": job.usage.cached, "cache_write_tokens": 0},
        "output_tokens": job.usage.completion,
        "output_tokens_details": {"reasoning_tokens": reasoning_in(job.outputs)},
        "total_tokens": job.usage.prompt + job.usage.completion,
    }
