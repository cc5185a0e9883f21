"""Segments: the inputs of a product, cut among programs where its tiles are too few to keep a device busy.

Owns the sum of what they made, in their order, and that their number is a power of two. How many a product has is for
`matmul_tiles` and `quantised_tiles` to say. Knows no weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program of `sum_kernel`


@triton.jit(do_not_specialize=["tokens"])
def sum_kernel(parts, bias, out, tokens, outputs, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [tokens, outputs] = the sum of parts [SEGMENTS, tokens, outputs], in their order, plus bias."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < outputs
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for segment in tl.static_range(SEGMENTS):
        place = (segment * tokens + token) * outputs + column
        total += tl.load(parts + place, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * outputs + column, total.to(out.dtype.element_ty), mask=inside)


def add_segments(made: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [tokens, outputs] of made [segments, tokens, outputs] fp32, and bias."""
    segments, tokens, outputs = made.shape
    sum_kernel[(tokens, triton.cdiv(outputs, BLOCK))](
        made, bias, out, tokens, outputs, SEGMENTS=segments, BLOCK=BLOCK
    )


def power_of_two(most: int) -> int:
    """The largest that is not above `most`; 1 at least."""
    return 1 << max(0, most.bit_length() - 1)
