"""Normalisers: of each row of logits its largest and the log of its sum of exponentials, in two launches.

Owns the second one; the first is that of `sampling`, which notes of each block of the vocabulary its largest logit
and a sum of whole numbers, at a temperature of 1. Knows nothing of draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import Normalisers
from kernels.gpu.sampling import BLOCK, block_kernel
from kernels.gpu.token_weights import STEPS


@triton.jit
def normaliser_kernel(maxima, sums, largests, log_sums, blocks, BLOCKS: tl.constexpr):
    """largests and log_sums [S] fp32, from maxima and sums [S, blocks]; BLOCKS: `blocks`, rounded up to a power of
    two. Sums of blocks are added in fp64."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    place, inside = row * blocks + block, block < blocks
    largest = tl.load(maxima + place, mask=inside, other=float("-inf"))  # [BLOCKS]
    top = tl.max(largest, axis=0)
    broken = tl.max((largest != largest).to(tl.int32), axis=0) > 0
    scales = tl.exp(largest - top).to(tl.float64)
    total = tl.sum(tl.load(sums + place, mask=inside, other=0).to(tl.float64) * scales, axis=0) / STEPS
    tl.store(largests + row, tl.where(broken, float("nan"), top))
    tl.store(log_sums + row, tl.log(total).to(tl.float32))


def normalisers(logits: Tensor) -> Normalisers:
    rows, vocab = logits.shape
    found = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
    if rows:
        blocks = triton.cdiv(vocab, BLOCK)
        maxima = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
        sums = torch.empty((rows, blocks), dtype=torch.int64, device=logits.device)
        block_kernel[(rows, blocks)](
            logits, None, maxima, None, sums, None, logits.stride(0), vocab, blocks,
            BLOCK=BLOCK, GROUP=1, num_warps=8,
        )  # fmt: skip
        normaliser_kernel[(rows,)](maxima, sums, *found, blocks, BLOCKS=triton.next_power_of_2(blocks))
    return Normalisers(*found)
