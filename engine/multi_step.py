"""How many steps of decoding a plan may take in one go, before anybody looks at what was drawn.

Owns that choice. On a GPU the host costs as much as a small step does, so rows that need nothing of it between two
tokens decode several: their tokens stay on the device and come back together. What is computed for a sequence behind
its end is thrown away; ends that are known beforehand (`max_tokens`) decide how long a run may be. After the
multi-step scheduling of vLLM 0.6 (2024). Knows no pages (`scheduler`) and no tensors (`decode_steps`).
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.sequence import Sequence

MOST_WASTED = 1 / 32  # of what the rows of such a plan compute, behind ends that are known


def decodes_freely(sequence: Sequence) -> bool:
    """Whether its next tokens are drawn from the logits as they are, by temperature and seed alone, and nothing is
    asked about them."""
    sampling = sequence.request.sampling
    return (
        sampling.draws_plainly
        and sequence.rules is None
        and sequence.matcher is None
        and sequence.num_generated >= sampling.min_tokens
    )


def steps_together(rows: Mapping[Sequence, int], most: int) -> int:
    """At most `most`, a power of two less each time; 1 where some row must be looked at. `rows`: tokens that each
    sequence computes in the plan."""
    if most == 1 or any(count != 1 or one.num_pending != 1 for one, count in rows.items()):
        return 1
    if not all(map(decodes_freely, rows)):
        return 1
    wanted = [one.num_wanted for one in rows]
    while most > 1 and sum(most - count for count in wanted if count < most) > MOST_WASTED * most * len(
        wanted
    ):
        most //= 2
    return most
