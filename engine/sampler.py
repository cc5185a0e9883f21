"""Sampler: logits to token ids and their logprobs, by each row's own parameters.

Owns masking, filtering, drawing and the logprobs of what was drawn. Knows no pages and no text. A draw
depends on the row's logits, its seed and its position alone: the noise is a hash, not a stream, sums are in
float64, and ties are broken by token id, so the crowd in a step changes nothing. A feature that no row asks
for costs nothing.

Order as in vLLM: the grammar's mask (`token_masks`), min_tokens, the request's own rules for logits (`adjust`),
temperature, min-p, top-k, top-p.
Logprobs are taken before all of them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.adjust import adjust
from engine.config import ModelConfig
from engine.logprobs import log_softmax, ranked, token_logprobs
from engine.plan import FAILED, Draws, Row
from engine.request import TokenLogprobs
from engine.running_sums import running_sums
from engine.token_masks import TokenMasks

TOP_P_CANDIDATES = 1024  # nearly always hold the nucleus; a full sort is the fallback
_INVERSE_2_53 = 2.0**-53


class Sampler:
    def __init__(self, config: ModelConfig) -> None:
        self._vocab_size = config.vocab_size
        self._eos = config.eos_token_ids
        self._masks = TokenMasks()

    def __call__(self, logits: Tensor, rows: list[Row]) -> Draws:
        """logits `[S, vocab]`, any float dtype, overwritten; `rows` has S entries. One token id per row, or
        `FAILED` where the largest logit is NaN or infinite, or the logprob that was asked for is, or where the
        row's grammar cannot go on (`Matcher.error`)."""
        asked = [i for i, row in enumerate(rows) if row.sequence.request.sampling.logprobs is not None]
        raw = log_softmax(logits[torch.tensor(asked, device=logits.device)]) if asked else None
        self._masks.apply(logits, rows)
        self._mask_early_ends(logits, rows)
        if any(row.sequence.rules is not None for row in rows):
            logits = logits.float()
            adjust(logits, rows)
        best, greedy = logits.max(dim=1)  # the lowest index wins a tie; NaN wins everything
        tokens = torch.where(torch.isfinite(best), greedy, FAILED)
        drawn = [i for i, row in enumerate(rows) if not row.sequence.request.sampling.greedy]
        if drawn:
            self._draw(logits, best, tokens, rows, drawn)
        logprobs = {} if raw is None else _logprobs(raw, tokens, rows, asked)
        return Draws(tokens.tolist(), logprobs)

    def _mask_early_ends(self, logits: Tensor, rows: list[Row]) -> None:
        for i, row in enumerate(rows):
            sampling = row.sequence.request.sampling
            if row.sequence.num_generated >= sampling.min_tokens:
                continue
            ends = sampling.end_token_ids(self._eos)
            allowed = [token_id for token_id in ends if token_id < self._vocab_size]
            if allowed:
                logits[i, allowed] = float("-inf")

    def _draw(self, logits: Tensor, best: Tensor, tokens: Tensor, rows: list[Row], drawn: list[int]) -> None:
        """Fill `tokens` at the rows `drawn`, each from its own distribution."""
        sequences = [rows[i].sequence for i in drawn]
        params = [sequence.request.sampling for sequence in sequences]
        noise = uniforms([s.seed for s in sequences], [len(s.token_ids) for s in sequences])
        whole = [j for j, p in enumerate(params) if p.top_k == 0 and p.top_p >= 1.0]
        narrowed = [j for j, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
        device = logits.device
        for chosen in (whole, narrowed):
            if not chosen:
                continue
            index = torch.tensor([drawn[j] for j in chosen], device=device)
            picked = logits[index].float()  # [n, vocab]
            top = best[index].double()[:, None]
            heat = torch.tensor([params[j].temperature for j in chosen], dtype=torch.float64, device=device)
            min_p = [params[j].min_p for j in chosen]
            if any(min_p):
                _mask_unlikely(picked, top, heat, torch.tensor(min_p, dtype=torch.float64, device=device))
            u = torch.from_numpy(noise[chosen]).to(device)
            if chosen is whole:
                weights = ((picked.double() - top) / heat[:, None]).exp_()
                found = _inverse_cdf(running_sums(weights), u, picked.shape[1])
            else:
                top_k = torch.tensor([params[j].top_k for j in chosen], device=device)
                top_p = torch.tensor([params[j].top_p for j in chosen], dtype=torch.float64, device=device)
                found = _draw_narrowed(picked, top, heat, u, top_k, top_p)
            tokens[index] = torch.where(torch.isfinite(best[index]), found, FAILED)


def _draw_narrowed(
    logits: Tensor, top: Tensor, heat: Tensor, u: Tensor, top_k: Tensor, top_p: Tensor
) -> Tensor:
    """Top-k (0 is off), then top-p, then one draw. logits `[n, vocab]`, the others `[n]` or `[n, 1]`."""
    vocab = logits.shape[1]
    limit = torch.where(top_k > 0, top_k, TOP_P_CANDIDATES).clamp(max=vocab)
    width = int(limit.max())
    kept, order = ranked(logits, width)
    ranks = torch.arange(width, device=logits.device)
    weights = ((kept.double() - top) / heat[:, None]).exp_()
    weights.masked_fill_(ranks >= limit[:, None], 0.0)
    sums = running_sums(weights)
    # what the nucleus is a share of: the k candidates, or without top-k the whole vocabulary
    mass = sums[:, -1].clone()
    unlimited = (top_k == 0).nonzero()[:, 0]
    if len(unlimited):
        whole = ((logits[unlimited].double() - top[unlimited]) / heat[unlimited, None]).exp_()
        mass[unlimited] = running_sums(whole)[:, -1]  # a plain sum takes another order for another row count
    # a token stays if those ranked before it have not yet reached top_p; the first always stays
    size = (sums - weights < (top_p * mass)[:, None]).logical_and_(ranks < limit[:, None]).sum(dim=1)
    size.clamp_(min=1)
    short = (top_k == 0) & (size >= limit) & (limit < vocab)
    found = order.gather(1, _inverse_cdf(sums, u, size)[:, None])[:, 0]
    for i in short.nonzero()[:, 0].tolist():  # the nucleus is wider than the candidates: sort this row whole
        row = slice(i, i + 1)
        kept, order = ranked(logits[row], vocab)
        weights = ((kept.double() - top[row]) / heat[row, None]).exp_()
        sums = running_sums(weights)
        size = (sums - weights < (top_p * mass)[row, None]).sum(dim=1).clamp_(min=1)
        found[i] = order[0, _inverse_cdf(sums, u[row], size)[0]]
    return found


def _mask_unlikely(logits: Tensor, top: Tensor, heat: Tensor, min_p: Tensor) -> None:
    """Min-p: logits `[n, vocab]` of tokens less likely than that share of the likeliest become -inf.
    top `[n, 1]`, heat and min_p `[n]`, float64; an exponential of 0 is 1, so the likeliest always stays."""
    shares = ((logits.double() - top) / heat[:, None]).exp_()
    logits.masked_fill_(shares < min_p[:, None], float("-inf"))


def _logprobs(raw: Tensor, tokens: Tensor, rows: list[Row], asked: list[int]) -> dict[int, TokenLogprobs]:
    """raw `[len(asked), vocab]`, tokens `[S]`. By row, for rows in `asked` that did not fail; a row whose
    logprob is not finite (an infinite logit that min_tokens masked) becomes `FAILED` in `tokens`."""
    counts = [rows[i].sequence.request.sampling.logprobs or 0 for i in asked]
    made = token_logprobs(raw, tokens[torch.tensor(asked, device=tokens.device)], counts)
    for i, one in zip(asked, made, strict=True):
        if one is None:
            tokens[i] = FAILED
    return {i: one for i, one in zip(asked, made, strict=True) if one is not None}


def _inverse_cdf(sums: Tensor, u: Tensor, size: Tensor | int) -> Tensor:
    """First index whose cumulative weight exceeds u times the total of the first `size` weights. `[n]`."""
    last = torch.as_tensor(size, device=sums.device).expand(sums.shape[0]) - 1
    total = sums.gather(1, last[:, None])
    found = torch.searchsorted(sums, u[:, None] * total, right=True)[:, 0]
    return torch.minimum(found, last)


def uniforms(seeds: list[int], positions: list[int]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 bits per (sequence seed, position): SplitMix64's mixer over
    both (Steele et al. 2014), so no state is carried from token to token."""
    with np.errstate(over="ignore"):
        state = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
        state ^= np.array(positions, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
    result: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * _INVERSE_2_53
    return result


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
