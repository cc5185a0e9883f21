"""The way from one step of decoding to the next, in one launch: what was drawn is kept and becomes the next input.

Owns the bookkeeping of rows that decode without the host. Rows meet nobody: a program reads, changes and writes the
numbers of its own. Knows nothing of draws.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import DecodingRows, Normalisers

BLOCK = 128  # rows of a program


@triton.jit(do_not_specialize=["rows", "table_stride", "made_stride", "told_stride", "logits_stride"])
def advance_kernel(
    token_ids, lengths, limits, page_table, counts, positions, slots, context_lens, made, told,
    drawn, logits, largest, log_sums, rows, table_stride, made_stride, told_stride, logits_stride,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `DecodingRows`; told: its logprobs. drawn None: nothing was, a launch begins. logits None: no logprobs."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = row < rows
    length, limit = tl.load(lengths + row, mask=held, other=0), tl.load(limits + row, mask=held, other=0)
    count = tl.zeros((BLOCK,), tl.int64)
    if drawn is not None:
        count = tl.load(counts + row, mask=held, other=0)
        length += 1
    goes_on = (length > 0) & (length <= limit)
    position = tl.maximum(tl.minimum(length, limit) - 1, 0)
    place = page_table + row.to(tl.int64) * table_stride + position // PAGE
    page = tl.load(place, mask=held & goes_on, other=0).to(tl.int64)

    tl.debug_barrier()  # in place: other threads have read what this one overwrites
    if drawn is not None:
        found = tl.load(drawn + row, mask=held, other=0)
        token = tl.maximum(found, 0)
        tl.store(made + count * made_stride + row, found, mask=held)
        tl.store(token_ids + row, token, mask=held)
        tl.store(lengths + row, length, mask=held)
        if logits is not None:
            x = tl.load(logits + row.to(tl.int64) * logits_stride + token, mask=held, other=0.0).to(
                tl.float32
            )
            top, log_sum = tl.load(largest + row, mask=held), tl.load(log_sums + row, mask=held)
            tl.store(told + count * told_stride + row, (x - top) - log_sum, mask=held)
        count += 1
    tl.store(counts + row, count, mask=held)
    tl.store(positions + row, position, mask=held)
    tl.store(slots + row, tl.where(goes_on, page * PAGE + position % PAGE, -1), mask=held)
    tl.store(context_lens + row, tl.where(goes_on, length, 0).to(tl.int32), mask=held)


def advance(
    rows: DecodingRows, drawn: Tensor | None, logits: Tensor | None = None, of: Normalisers | None = None
) -> None:
    count = rows.token_ids.shape[0]
    if not count:
        return
    largest, log_sums = (None, None) if of is None else of
    advance_kernel[(triton.cdiv(count, BLOCK),)](
        rows.token_ids, rows.lengths, rows.limits, rows.page_table, rows.counts,
        rows.positions, rows.slots, rows.context_lens, rows.made, rows.logprobs,
        drawn, logits, largest, log_sums, count,
        rows.page_table.stride(0), rows.made.stride(0), rows.logprobs.stride(0),
        0 if logits is None else logits.stride(0), PAGE=rows.page_size, BLOCK=BLOCK,
    )  # fmt: skip
