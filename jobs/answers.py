"""Answers: an engine's Completion turned into the Outcome that SQL will hold.

Owns the step from token ids to text, which the worker does so that the engine process only computes. Knows
neither SQL nor pipes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.request import Completion, TokenLogprobs
from engine.tokenizer import Tokenizer
from jobs.outcomes import Outcome

LEAST_LOGPROB = -9999.0  # OpenAI's word for all but impossible: JSON knows no infinity


def outcome_of(completion: Completion, tokenizer: Tokenizer) -> Outcome:
    """`completed` with text, `failed` with the engine's reason, or `released` for an aborted request.

    An aborted request has made `num_generated` tokens, all of which its checkpoint keeps; whether that is a cancel or
    a hand-back is for the job's state in SQL to say. A job whose checkpoint does not fit (the model was exchanged)
    starts over.
    """
    job_id, fence = completion.id
    if completion.aborted:
        worked = completion.num_generated > 0
        return Outcome(
            job_id=job_id,
            fence=fence,
            kind="released",
            prompt_tokens=completion.num_prompt if worked else 0,
            completion_tokens=completion.num_generated,
            kept_tokens=completion.num_generated,
            generated=completion.generated or None,
        )
    if completion.error is not None and completion.error.code == "invalid_checkpoint":
        return Outcome(job_id=job_id, fence=fence, kind="released", generated=())
    if completion.error is not None:
        return Outcome(
            job_id=job_id,
            fence=fence,
            kind="failed",
            error={
                "code": completion.error.code,
                "message": completion.error.message,
                "param": completion.error.param,
            },
            prompt_tokens=completion.num_prompt if completion.num_generated else 0,
            completion_tokens=completion.num_generated,
        )
    outputs = []
    for index, output in enumerate(completion.outputs):
        shown: dict[str, Any] = {
            "index": index,
            "text": output.text(tokenizer.decode),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if output.logprobs is not None:
            shown["logprobs"] = _logprobs(output.logprobs, tokenizer)
        outputs.append(shown)
    return Outcome(
        job_id=job_id,
        fence=fence,
        kind="completed",
        outputs=outputs,
        prompt_tokens=completion.num_prompt,
        completion_tokens=sum(len(output.token_ids) for output in completion.outputs),
        cached_tokens=completion.num_cached_tokens,
    )


def _logprobs(tokens: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """OpenAI's object of a chat's choice: one entry per token of the output, those of a cut stop string included."""
    spelled: dict[int, dict[str, Any]] = {}

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        if token_id not in spelled:
            spelled[token_id] = {
                "token": tokenizer.token_text(token_id),
                "bytes": list(tokenizer.token_bytes(token_id)) or None,  # a control token has none
            }
        return spelled[token_id] | {"logprob": max(logprob, LEAST_LOGPROB)}

    content = [
        entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*likeliest) for likeliest in one.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}
