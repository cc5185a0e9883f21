"""Sampling: of each row of logits one token, in two launches that read nothing back to the host, and a third one
where rows may be filtered (`filters`).

The vocabulary is cut into blocks of a fixed size. The first kernel reads all logits once and notes of each block its
largest, where that is, and how much its tokens weigh; the second finds the block of the draw, and the token in it.

Weights of a block are whole numbers of 2⁻⁴⁰ of its largest one's, and are summed as integers: no order of the sum
can change it, whatever layout the compiler has chosen, and no token of weight 0 is met. Above the blocks, sums
and the uniform number, with all its 53 bits, are fp64. A temperature that is 0 in fp32 is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import FAILED, Filters
from kernels.gpu.filters import GROUP, draw_filtered
from kernels.gpu.noise import uniform
from kernels.gpu.token_weights import COLDEST, weights

BLOCK = 4096  # of the vocabulary, for one program
NO_TOKEN = tl.constexpr(FAILED)


@triton.jit
def block_kernel(
    logits, temperatures, maxima, firsts, sums, group_maxima, stride, vocab, blocks,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of each block of each row: the largest logit, NaN if there is any, its first token id, and the sum of weights;
    maxima fp32, firsts int32 and sums int64, all [S, blocks]. group_maxima [S, blocks, BLOCK / GROUP] fp32: the
    largest of each group of tokens in the block; or None. So may temperatures be, which are 1 then, and firsts."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    largest = tl.max(values, axis=0)
    temperature = tl.full((), 1.0, tl.float32)
    if temperatures is not None:
        temperature = tl.load(temperatures + row).to(tl.float32)
    held = weights(values, largest, temperature)
    broken = tl.max((values != values).to(tl.int32), axis=0) > 0
    place = row * blocks + block
    tl.store(maxima + place, tl.where(broken, float("nan"), largest))
    if firsts is not None:
        tl.store(firsts + place, tl.min(tl.where(values == largest, token, vocab), axis=0))
    tl.store(sums + place, tl.sum(held, axis=0))
    if group_maxima is not None:
        group = tl.arange(0, BLOCK // GROUP)
        groups = tl.max(tl.reshape(values, (BLOCK // GROUP, GROUP)), axis=1)
        tl.store(group_maxima + place * (BLOCK // GROUP) + group, groups)


@triton.jit
def draw_kernel(
    logits, temperatures, seeds, positions, maxima, firsts, sums, tokens, stride, vocab, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """tokens [S] int64, from what `block_kernel` has noted; BLOCKS: `blocks`, rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    place, inside = row * blocks + block, block < blocks
    largest = tl.load(maxima + place, mask=inside, other=float("-inf"))  # [BLOCKS]
    top = tl.max(largest, axis=0)
    broken = tl.max((largest != largest).to(tl.int32), axis=0) > 0
    temperature = tl.load(temperatures + row).to(tl.float32)
    if broken | (tl.abs(top) == float("inf")):
        token = tl.full((), NO_TOKEN, tl.int64)
    elif temperature == 0.0:
        first = tl.load(firsts + place, mask=inside, other=0)
        token = tl.min(tl.where(largest == top, first, vocab), axis=0).to(tl.int64)
    else:
        scales = tl.exp((largest - top) / tl.maximum(temperature, COLDEST)).to(tl.float64)
        totals = tl.load(sums + place, mask=inside, other=0).to(tl.float64) * scales
        u = uniform(tl.load(seeds + row), tl.load(positions + row))
        target = u * tl.sum(totals, axis=0)
        above = (tl.cumsum(totals, axis=0) > target) & (totals > 0.0)
        last = tl.max(tl.where(totals > 0.0, block, 0), axis=0)  # should rounding leave none above
        chosen = tl.minimum(tl.min(tl.where(above, block, BLOCKS), axis=0), last)

        inner = chosen * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + inner, mask=inner < vocab, other=float("-inf"))
        held = weights(values.to(tl.float32), tl.load(maxima + row * blocks + chosen), temperature)
        # what is left of the target, in the steps of this block; below their sum, so that a token is found
        scale = tl.sum(tl.where(block == chosen, scales, 0.0), axis=0)
        left = (target - tl.sum(tl.where(block < chosen, totals, 0.0), axis=0)) / scale
        most = (tl.sum(held, axis=0) - 1).to(tl.float64)
        steps = tl.minimum(tl.maximum(left, 0.0), most).to(tl.int64)
        token = tl.min(tl.where(tl.cumsum(held, axis=0) > steps, inner, vocab), axis=0).to(tl.int64)
    tl.store(tokens + row, token)


def sample(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, filters: Filters | None = None
) -> Tensor:
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    blocks = triton.cdiv(vocab, BLOCK)
    maxima = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    firsts = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
    sums = torch.empty((rows, blocks), dtype=torch.int64, device=logits.device)
    group_maxima = None
    if filters is not None:
        group_maxima = torch.empty(
            (rows, blocks * (BLOCK // GROUP)), dtype=torch.float32, device=logits.device
        )
    stride = logits.stride(0)
    block_kernel[(rows, blocks)](
        logits, temperatures, maxima, firsts, sums, group_maxima, stride, vocab, blocks,
        BLOCK=BLOCK, GROUP=GROUP, num_warps=8,
    )  # fmt: skip
    draw_kernel[(rows,)](
        logits, temperatures, seeds, positions, maxima, firsts, sums, tokens, stride, vocab, blocks,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=8,
    )  # fmt: skip
    if filters is not None and group_maxima is not None:
        draw_filtered(logits, temperatures, seeds, positions, filters, maxima, sums, group_maxima, tokens)
    return tokens
