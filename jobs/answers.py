"""Answers: an engine's Completion, or its death, turned into the Outcome that SQL will hold.

Owns the step from token ids to text, which the worker does so that the engine process only computes. Knows
neither SQL nor pipes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from engine.reasoning import ReasoningFormat, told
from engine.request import Completion, Output, RequestError, TokenLogprobs
from engine.tokenizer import Tokenizer
from jobs.holdings import Holding
from jobs.outcomes import Outcome
from jobs.quarantine import is_guilty, suspicion_after

log = logging.getLogger(__name__)

LEAST_LOGPROB = -9999.0  # OpenAI's word for all but impossible: JSON knows no infinity


def param_of(error: RequestError, *, chat: bool) -> str | None:
    """The field at fault, as the job's body calls it: which name the prompt has there, the engine cannot say."""
    if error.param is None and error.code == "context_length_exceeded":
        return "messages" if chat else "prompt"
    return error.param


def outcome_of(
    completion: Completion, tokenizer: Tokenizer, reasoning: ReasoningFormat | None = None, *, chat: bool
) -> Outcome:
    """`completed` with text, `failed` with the engine's reason, or `released` for an aborted request. `reasoning`:
    how this model marks what it thinks. `chat`: it came as `messages`.

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
    if (error := completion.error) is not None:
        return _failure(completion, error.code, error.message, param_of(error, chat=chat))
    try:
        outputs = [_shown(index, one, tokenizer, reasoning) for index, one in enumerate(completion.outputs)]
    except Exception as error:
        # Raised to whoever reads the engine's pipe, it would end the engine with all that is in it.
        log.error("answers.unreadable job=%.80a error=%s", job_id, type(error).__name__)
        return _failure(completion, "decode_failed", "this job's output could not be put into words")
    return Outcome(
        job_id=job_id,
        fence=fence,
        kind="completed",
        outputs=outputs,
        prompt_tokens=completion.num_prompt,
        completion_tokens=sum(len(output.token_ids) for output in completion.outputs),
        cached_tokens=completion.num_cached_tokens,
    )


def _failure(completion: Completion, code: str, message: str, param: str | None = None) -> Outcome:
    return Outcome(
        job_id=completion.id.job_id,
        fence=completion.id.fence,
        kind="failed",
        error={"code": code, "message": message, "param": param},
        prompt_tokens=completion.num_prompt if completion.num_generated else 0,
        completion_tokens=completion.num_generated,
    )


def _shown(
    index: int, output: Output, tokenizer: Tokenizer, reasoning: ReasoningFormat | None
) -> dict[str, Any]:
    said = told(output, tokenizer, reasoning)
    shown: dict[str, Any] = {
        "index": index,
        "text": said.text,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if said.reasoning is not None:
        shown |= {"reasoning": said.reasoning, "reasoning_tokens": said.num_reasoning}
    if output.logprobs is not None:
        shown["logprobs"] = _logprobs(output.logprobs, tokenizer)
    return shown


def outcome_of_death(holding: Holding, returncode: int, *, stalled: bool, alone: bool) -> Outcome:
    """Of a job that was in an engine which ended with `returncode`: `released`, under suspicion, or `failed` when it
    is convicted, which only happens to one that was there `alone` (`jobs.quarantine`). `stalled`: the engine was
    killed for making no steps."""
    before = holding.claim.crashes
    after = suspicion_after(before, returncode, stalled=stalled, progressed=holding.progressed)
    guilty = alone and is_guilty(before, after, progressed=holding.progressed)
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
