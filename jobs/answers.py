"""Answers: an engine's Completion, or its death, turned into the Outcome that SQL will hold.

Owns the step from token ids to text, which the worker does so that the engine process only computes. Knows
neither SQL nor pipes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.request import Completion, RequestError, TokenLogprobs
from engine.tokenizer import Tokenizer
from jobs.holdings import Holding
from jobs.outcomes import Outcome
from jobs.quarantine import is_guilty, suspicion_after

LEAST_LOGPROB = -9999.0  # OpenAI's word for all but impossible: JSON knows no infinity


def param_of(error: RequestError, *, chat: bool) -> str | None:
    """The field at fault, as the job's body calls it: which name the prompt has there, the engine cannot say."""
    if error.param is None and error.code == "context_length_exceeded":
        return "messages" if chat else "prompt"
    return error.param


def outcome_of(completion: Completion, tokenizer: Tokenizer, *, chat: bool) -> Outcome:
    """`completed` with text, `failed` with the engine's reason, or `released` for an aborted request. `chat`: it came
    as `messages`.

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
                "param": param_of(completion.error, chat=chat),
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


def outcome_of_death(holding: Holding, returncode: int, *, stalled: bool, alone: bool) -> Outcome:
    """Of a job that was in an engine which ended with `returncode`: `released`, under suspicion, or `failed` when it
    is convicted, which only happens to one that was there `alone` (`jobs.quarantine`). `stalled`: the engine was
    killed for making no steps."""
    before = holding.claim.crashes
    after = suspicion_after(before, returncode, stalled=stalled, progressed=holding.progressed)
    guilty = alone and is_guilty(before, after)
    error = {
        "code": "engine_crash",
        "message": f"the engine process died (exit status {returncode}) while running this job alone",
    }
    return Outcome(
        job_id=holding.claim.job_id,
        fence=holding.claim.fence,
        kind="failed" if guilty else "released",
        error=error if guilty else None,
        completion_tokens=max(holding.num_generated, holding.num_saved),
        kept_tokens=holding.num_saved,
        crashes=after,
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
