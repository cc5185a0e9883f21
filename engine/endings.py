"""How a sample ends: end of sequence, a stop token, its length, or a loop it has fallen into; or that it fails.

Owns that order. Stop strings are text and are found by whoever has a tokenizer (`run`). Knows no pages and no queue.
"""

from __future__ import annotations

from collections.abc import Collection

from engine.repetition import repeats
from engine.request import Output, RequestError
from engine.sequence import Sequence


def ending(sequence: Sequence, token_id: int, eos_token_ids: Collection[int]) -> Output | None:
    """What ended `sequence` with this token, its last, if anything did. End of sequence before stop tokens."""
    sampling = sequence.request.sampling
    if sequence.num_generated > sampling.min_tokens:
        if token_id in eos_token_ids and not sampling.ignore_eos:
            return _stopped(sequence)
        if token_id in sampling.stop_token_ids:
            return _stopped(sequence, token_id)
    if sequence.num_generated >= sequence.max_tokens:
        return Output(token_ids=tuple(sequence.generated), finish_reason="length")
    rule = sampling.repetition_detection
    made = sequence.num_generated
    if rule is not None and made >= sampling.min_tokens and repeats(sequence.token_ids, made, rule):
        return Output(token_ids=tuple(sequence.generated), finish_reason="repetition")
    return None


def goes_on(sequence: Sequence, drawn: tuple[int, ...], eos_token_ids: Collection[int]) -> bool:
    """Whether plainly none of several tokens ends it, nor is one missing: cheaper than to ask for each."""
    sampling = sequence.request.sampling
    return (
        len(drawn) < sequence.num_wanted
        and sampling.repetition_detection is None
        and min(drawn) >= 0
        and (sampling.ignore_eos or not any(token_id in drawn for token_id in eos_token_ids))
        and not any(token_id in drawn for token_id in sampling.stop_token_ids)
    )


def failure(sequence: Sequence) -> RequestError:
    """Why a sequence left without an output."""
    if sequence.matcher is not None and sequence.matcher.error:
        return RequestError(code="grammar_error", message=f"structured_outputs: {sequence.matcher.error}")
    message = "the model's output was not finite (NaN or infinity) for this request"
    return RequestError(code="numerics", message=message)


def _stopped(sequence: Sequence, stop_token_id: int | None = None) -> Output:
    return Output(
        token_ids=tuple(sequence.generated),
        finish_reason="stop",
        stop_reason=stop_token_id,
        last_is_silent=not sequence.request.sampling.include_stop_str_in_output,
    )
