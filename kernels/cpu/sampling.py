"""Sampling on a CPU: the reference set's, but that greedy rows are one pass of C over their logits, and rows of
top-k and top-p are not sorted whole.

Owns those short cuts: the likeliest tokens nearly always hold the nucleus, and only a row where they do not is
sorted.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_long, c_void_p

import numpy as np
import torch
from torch import Tensor

from kernels import FAILED, Filters, reference
from kernels.cpu.matmul import SUFFIXES
from kernels.noise import uniforms
from kernels.ranking import ranked
from kernels.running_sums import running_sums

CANDIDATES = 1024  # of a row without top-k


class Sampling:
    """The operation of the contract, `sample`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._likeliest = {}
        for dtype, suffix in SUFFIXES.items():
            self._likeliest[dtype] = likeliest = getattr(library, f"likeliest_{suffix}")
            likeliest.argtypes = (c_long, c_long, c_void_p, c_long, c_void_p, c_int)
            likeliest.restype = None

    def sample(
        self,
        logits: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        filters: Filters | None = None,
    ) -> Tensor:
        rows, vocab = logits.shape
        hot = torch.from_numpy(np.flatnonzero(temperatures.numpy() > 0))  # torch takes ten times as long
        if len(hot) == rows or logits.dtype not in self._likeliest or logits.stride(1) != 1:
            return _sampled(logits, temperatures, seeds, positions, filters)
        tokens = torch.empty(rows, dtype=torch.int64)
        self._likeliest[logits.dtype](
            rows, vocab, logits.data_ptr(), logits.stride(0), tokens.data_ptr(), torch.get_num_threads()
        )
        if len(hot):
            if filters is not None:
                filters = Filters(filters.top_k[hot], filters.top_p[hot], filters.min_p[hot])
            tokens[hot] = _sampled(logits[hot], temperatures[hot], seeds[hot], positions[hot], filters)
        return tokens


def _sampled(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, filters: Filters | None
) -> Tensor:
    if filters is None:
        return reference.sample(logits, temperatures, seeds, positions)
    vocab = logits.shape[1]
    top_k = torch.where(filters.top_k < vocab, filters.top_k, 0)
    hot = temperatures > 0
    unlikely = (hot & (filters.min_p > 0)).nonzero()[:, 0]
    narrowed = (hot & ((top_k > 0) | (filters.top_p < 1.0))).nonzero()[:, 0]
    if len(unlikely):
        likely = _likely(logits[unlikely], temperatures[unlikely], filters.min_p[unlikely])
        logits = logits.index_copy(0, unlikely, likely)
    # of narrowed rows the greedy token, which says whether they fail
    tokens = reference.sample(logits, temperatures.index_fill(0, narrowed, 0.0), seeds, positions)
    if len(narrowed):
        u = torch.from_numpy(uniforms(seeds[narrowed].numpy(), positions[narrowed].numpy()))
        picked = logits[narrowed].float() + 0.0  # no -0.0
        heat = temperatures[narrowed].double()
        found = _draw(picked, heat, u, top_k[narrowed], filters.top_p[narrowed], CANDIDATES)
        tokens[narrowed] = torch.where(tokens[narrowed] == FAILED, FAILED, found)
    return tokens


def _likely(logits: Tensor, temperatures: Tensor, min_p: Tensor) -> Tensor:
    """logits `[n, vocab]`, those that min-p filters -inf."""
    least = logits.amax(dim=1).double() + temperatures.double() * min_p.log()
    return logits.masked_fill(logits.double() < least[:, None], float("-inf"))


def _draw(logits: Tensor, heat: Tensor, u: Tensor, top_k: Tensor, top_p: Tensor, candidates: int) -> Tensor:
    """Top-k, then top-p, then one draw: `[n]`. logits `[n, vocab]` fp32, the others `[n]`; `candidates`: how many
    of the likeliest tokens of rows without top-k are tried first."""
    vocab = logits.shape[1]
    top = logits.amax(dim=1).double()
    limit = torch.where(top_k > 0, top_k, candidates).clamp(max=vocab)
    width = int(limit.max())
    likeliest, order = ranked(logits, width)
    ranks = torch.arange(width)
    weights = ((likeliest.double() - top[:, None]) / heat[:, None]).exp_()
    weights.masked_fill_(ranks >= limit[:, None], 0.0)
    sums = running_sums(weights)
    # what the nucleus is a share of: the k candidates, or without top-k the whole vocabulary
    mass = sums[:, -1].clone()
    unlimited = (top_k == 0).nonzero()[:, 0]
    if len(unlimited) and width < vocab:
        whole = ((logits[unlimited].double() - top[unlimited, None]) / heat[unlimited, None]).exp_()
        mass[unlimited] = running_sums(whole)[:, -1]  # a plain sum takes another order for another row count
    stays = (sums - weights < (top_p * mass)[:, None]) | (top_p == 1.0)[:, None]
    stays &= ranks < limit[:, None]
    size = stays.sum(dim=1).clamp_(min=1)

    ids, places = torch.where(ranks < size[:, None], order, vocab)[:, : int(size.max())].sort(dim=1)
    sums = running_sums(weights.gather(1, places).masked_fill_(ids == vocab, 0.0))
    chosen = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)
    found = ids.gather(1, torch.minimum(chosen, size[:, None] - 1))[:, 0]
    short = (top_k == 0) & (size == limit) & (limit < vocab)  # the nucleus may be wider than the candidates
    for i in short.nonzero()[:, 0].tolist():
        row = slice(i, i + 1)
        found[row] = _draw(logits[row], heat[row], u[row], top_k[row], top_p[row], vocab)
    return found
