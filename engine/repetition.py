"""Repetition: whether a sample has fallen into a loop of tokens.

Owns the rule alone (vLLM's `repetition_detection`). Knows neither text nor why a model loops; a small model that
does it burns its whole `max_tokens`, and bulk jobs have nobody who watches.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.sampling_params import RepetitionDetectionParams


def repeats(token_ids: Sequence[int], num_generated: int, rule: RepetitionDetectionParams) -> bool:
    """Whether the last of the `num_generated` tokens at the end of `token_ids` are `min_count` times the same pattern
    of `min_pattern_size` to `max_pattern_size` tokens. Costs no more for a longer sample."""
    last = token_ids[-1]
    for size in range(rule.min_pattern_size, rule.max_pattern_size + 1):
        length = size * rule.min_count
        if length > num_generated:
            return False  # longer patterns need longer tails still
        if token_ids[-1 - size] == last:
            tail = token_ids[-length:]
            if tail[size:] == tail[:-size]:
                return True
    return False
