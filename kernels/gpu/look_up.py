"""What a step takes from tables, in one launch: embeddings of its tokens, cosines and sines of their positions.

Copies bits and computes nothing. Knows no model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import Rotations

BLOCK = 1024  # numbers that a program copies


@triton.jit
def _copy(table, out, line, token, start, width, BLOCK: tl.constexpr):
    """Of `line` of a table [n, width] numbers from `start` on, into line `token` of out [T, width]."""
    column = start + tl.arange(0, BLOCK)
    inside = column < width
    tl.store(out + token * width + column, tl.load(table + line * width + column, mask=inside), mask=inside)


@triton.jit
def look_up_kernel(
    token_ids, positions, embedding, x, cos, sin, c, s, more_cos, more_sin, more_c, more_s, width, half, blocks,
    BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x [T, width] of embedding; c and s [T, half] fp32 of cos and sin, and so of the second pair. Programs [T,
    blocks + 1 if there are tables]. cos None: there are none; more_cos None: there is no second pair."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if block < blocks:
        _copy(embedding, x, tl.load(token_ids + token), token, block * BLOCK, width, BLOCK)
    elif cos is not None:
        position = tl.load(positions + token)
        _copy(cos, c, position, token, 0, half, HALF)
        _copy(sin, s, position, token, 0, half, HALF)
        if more_cos is not None:
            _copy(more_cos, more_c, position, token, 0, half, HALF)
            _copy(more_sin, more_s, position, token, 0, half, HALF)


def look_up(
    token_ids: Tensor, positions: Tensor, embedding: Tensor, tables: Rotations
) -> tuple[Tensor, Rotations]:
    tokens, width = token_ids.shape[0], embedding.shape[1]
    x = torch.empty((tokens, width), dtype=embedding.dtype, device=embedding.device)
    found = tuple(
        (cos.new_empty((tokens, cos.shape[1])), sin.new_empty((tokens, sin.shape[1]))) for cos, sin in tables
    )
    if not tokens:
        return x, found
    half = tables[0][0].shape[1] if tables else 0
    nothing = (None, None)
    first, second = (*zip(tables, found, strict=True), (nothing, nothing), (nothing, nothing))[:2]
    blocks = triton.cdiv(width, BLOCK)
    look_up_kernel[(tokens, blocks + bool(tables))](
        token_ids, positions, embedding, x, *first[0], *first[1], *second[0], *second[1], width, half, blocks,
        BLOCK=BLOCK, HALF=triton.next_power_of_2(half),
    )  # fmt: skip
    return x, found
