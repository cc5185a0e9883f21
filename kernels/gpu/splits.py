"""Where a context is cut into splits, which are attended to apart and then merged in their order.

The cuts lie at fixed tokens, whatever the context, the queries and the other rows are: so the order of a token's
sums is decided by its position alone. Splits are `FINE` tokens long at first; after `FINE_SPLITS` of them the length
doubles, and again after every `PER_OCTAVE` more, so that the partial results of a long context stay few: 32 for
128k tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

FINE = tl.constexpr(512)
FINE_SPLITS = tl.constexpr(16)
PER_OCTAVE = tl.constexpr(4)


@triton.jit
def split_start(split):
    """The first token of a split; also one behind the last token of the split before."""
    octave = tl.maximum(split - FINE_SPLITS, 0) // PER_OCTAVE
    # an octave: as many tokens as lie before it, in PER_OCTAVE splits; the first begins at FINE · FINE_SPLITS
    quarters = PER_OCTAVE + split - FINE_SPLITS - octave * PER_OCTAVE
    coarse = quarters * (FINE * FINE_SPLITS // PER_OCTAVE) << octave
    return tl.where(split < FINE_SPLITS, split * FINE, coarse)


@triton.jit
def split_of(token):
    """The split in which a token lies."""
    split = token // FINE
    if split >= FINE_SPLITS:
        split = FINE_SPLITS + 0
        while split_start(split + 1) <= token:
            split += 1
    return split


@triton.jit
def prefix_holds(split, shared, context):
    """Whether a split lies wholly in the first `shared` tokens of a context, and some token of the context behind it:
    so the last split of a context never does."""
    return split_start(split + 1) <= tl.minimum(shared, context - 1)


@triton.jit
def merged(total_max, total_sum, total, part_max, part_sum, part):
    """Softmax over two disjoint sets of tokens: maxima and sums [M], weighted values [M, D], fp32, base 2.

    A set without tokens has maximum -inf, sum 0 and values 0, and changes no bit of the other.
    """
    top = tl.maximum(total_max, part_max)
    safe = tl.where(top == float("-inf"), 0.0, top)
    old, new = tl.exp2(total_max - safe), tl.exp2(part_max - safe)
    return top, total_sum * old + part_sum * new, total * old[:, None] + part * new[:, None]


def splits_for(tokens: int) -> int:
    """How many splits hold the first `tokens` tokens."""
    fine, splits, per_octave = (int(number.value) for number in (FINE, FINE_SPLITS, PER_OCTAVE))
    if tokens <= fine * splits:
        return -(-tokens // fine)
    octave, length = 0, fine * splits
    while tokens > 2 * length:
        octave, length = octave + 1, 2 * length
    return splits + octave * per_octave + -(-(tokens - length) * per_octave // length)
