"""Answers: an engine's Completion turned into the Outcome that SQL will hold.

Owns the step from token ids to text, which the worker does so that the engine process only computes. Knows
neither SQL nor pipes.
"""

from __future__ import annotations

from engine.request import Completion
from engine.tokenizer import Tokenizer
from jobs.outcomes import Outcome


def outcome_of(completion: Completion, tokenizer: Tokenizer) -> Outcome:
    """`completed` with text, `failed` with the engine's reason, or `released` for an aborted request.

    An aborted request has made `num_generated` tokens; whether that is a cancel or a hand-back is for the
    job's state in SQL to say.
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
        )
    if completion.error is not None:
        return Outcome(
            job_id=job_id,
            fence=fence,
            kind="failed",
            error={"code": completion.error.code, "message": completion.error.message},
            prompt_tokens=completion.num_prompt if completion.num_generated else 0,
            completion_tokens=completion.num_generated,
        )
    outputs = []
    for index, output in enumerate(completion.outputs):
        outputs.append(
            {
                "index": index,
                "text": output.text(tokenizer.decode),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }
        )
    return Outcome(
        job_id=job_id,
        fence=fence,
        kind="completed",
        outputs=outputs,
        prompt_tokens=completion.num_prompt,
        completion_tokens=sum(len(output.token_ids) for output in completion.outputs),
        cached_tokens=completion.num_cached_tokens,
    )
