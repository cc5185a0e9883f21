"""Penalties: one launch changes the logits of the tokens that each row lists, another notes in the lists the tokens
that were drawn; nothing is read back to the host.

Owns both kernels. A row's entries are distinct tokens, so no two threads write to one logit. Knows nothing of draws.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import Penalties

BLOCK = 1024  # entries that are looked at together


@triton.jit
def penalise_kernel(
    logits, token_ids, times, lengths, repetitions, frequencies, presences, stride, list_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [S, vocab] fp32 in place; lists as in `Penalties`, rows of entries `list_stride` apart."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    length = tl.load(lengths + row)
    if start < length:
        place = start + tl.arange(0, BLOCK)
        held = place < length
        token = tl.load(token_ids + row * list_stride + place, mask=held, other=0)
        made = tl.load(times + row * list_stride + place, mask=held, other=0).to(tl.float32)
        at = logits + row * stride + token
        x = tl.load(at, mask=held, other=0.0)
        repetition = tl.load(repetitions + row)
        x = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
        x -= tl.load(frequencies + row) * made
        x -= tl.where(made > 0.0, tl.load(presences + row), 0.0)
        tl.store(at, x, mask=held)


@triton.jit
def count_kernel(token_ids, times, lengths, tokens, list_stride, room, BLOCK: tl.constexpr):
    """tokens [S] int64; lists as in `Penalties`, with room for so many entries of a row."""
    row = tl.program_id(0).to(tl.int64)
    length, token = tl.load(lengths + row), tl.load(tokens + row)
    if (length > 0) & (token >= 0):
        found = length
        for start in range(0, length, BLOCK):
            place = start + tl.arange(0, BLOCK)
            listed = tl.load(token_ids + row * list_stride + place, mask=place < length, other=-1)
            found = tl.minimum(found, tl.min(tl.where(listed == token, place, length), axis=0))
        entry = row * list_stride + found
        if found < length:
            tl.store(times + entry, tl.load(times + entry) + 1)
        elif length < room:
            tl.store(token_ids + entry, token.to(tl.int32))
            tl.store(times + entry, 1)
            tl.store(lengths + row, length + 1)


def penalise(logits: Tensor, penalties: Penalties) -> None:
    rows, room = penalties.token_ids.shape
    if rows:
        penalise_kernel[(rows, triton.cdiv(room, BLOCK))](
            logits, penalties.token_ids, penalties.times, penalties.lengths,
            penalties.repetition, penalties.frequency, penalties.presence,
            logits.stride(0), penalties.token_ids.stride(0), BLOCK=BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip


def count_tokens(penalties: Penalties, tokens: Tensor) -> None:
    rows, room = penalties.token_ids.shape
    if rows:
        count_kernel[(rows,)](
            penalties.token_ids, penalties.times, penalties.lengths, tokens,
            penalties.token_ids.stride(0), room, BLOCK=BLOCK,
        )  # fmt: skip
