"""Sampling on a CPU: one pass of C over each row of logits, greedy, plain or filtered (`sampling.h`).

Owns the passing of tensors to C, and the noise. Logits of other dtypes are left to the reference set.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from kernels import Filters, reference
from kernels.cpu.matmul import SUFFIXES
from kernels.noise import uniforms

CANDIDATE = 2  # size of a `candidate` of sampling.h, in int64


class Sampling:
    """The operation of the contract, `sample`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._sample = {}
        for dtype, suffix in SUFFIXES.items():
            self._sample[dtype] = sample = getattr(library, f"sample_{suffix}")
            sample.argtypes = (c_long, c_long, c_void_p, c_long, *[c_void_p] * 7, c_int)
            sample.restype = None

    def sample(
        self,
        logits: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        filters: Filters | None = None,
    ) -> Tensor:
        if logits.dtype not in self._sample or logits.stride(1) != 1:
            return reference.sample(logits, temperatures, seeds, positions, filters)
        rows, vocab = logits.shape
        threads = torch.get_num_threads()
        asked: list[Tensor | None] = [None] * 4
        if filters is not None:
            room = torch.empty(threads, 2 * vocab, CANDIDATE, dtype=torch.int64)
            asked = [filters.top_k.contiguous(), filters.top_p.contiguous(), filters.min_p.contiguous(), room]
        wide = temperatures.double().contiguous()
        noise = uniforms(seeds.numpy(), positions.numpy())
        tokens = torch.empty(rows, dtype=torch.int64)
        self._sample[logits.dtype](
            rows, vocab, logits.data_ptr(), logits.stride(0), wide.data_ptr(), noise.ctypes.data,
            *(None if one is None else one.data_ptr() for one in asked), tokens.data_ptr(), threads,
        )  # fmt: skip
        return tokens
