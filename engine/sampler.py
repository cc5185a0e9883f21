"""Sampler: logits to token ids and their logprobs, by each row's own parameters.

Owns masking, filtering, the draws of filtered rows and the logprobs of what was drawn; rows that take the greedy
token, or draw from the whole vocabulary, are the kernel set's, in one call. Knows no pages and no text. A draw
depends on the row's logits, its seed and its position alone: the noise is a hash, not a stream, sums here are in
float64, and ties are broken by token id, so the crowd in a step changes nothing. A feature that no row asks
for costs nothing.

Order as in vLLM: the grammar's mask (`token_masks`), min_tokens, the request's own rules for logits (`adjust`),
temperature, min-p, top-k, top-p.
Logprobs are taken before all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.adjust import adjust
from engine.config import ModelConfig
from engine.logprobs import log_softmax, ranked, token_logprobs
from engine.plan import FAILED, Draws, Row
from engine.request import TokenLogprobs
from engine.running_sums import running_sums
from engine.speculation import accept
from engine.token_masks import TokenMasks
from kernels import Kernels
from kernels.noise import uniforms
from kernels.reference import KERNELS as REFERENCE

TOP_P_CANDIDATES = 1024  # nearly always hold the nucleus; a full sort is the fallback


class Sampler:
    def __init__(self, config: ModelConfig, kernels: Kernels = REFERENCE) -> None:
        self._sample = kernels.sample
        self._vocab_size = config.vocab_size
        self._eos = config.eos_token_ids
        self._masks = TokenMasks()

    def __call__(self, logits: Tensor, rows: list[Row]) -> Draws:
        """logits `[S, vocab]`, any float dtype, overwritten: one behind each row's last token, and one behind each
        token that it proposes. A token id per row, and those behind it that count (`speculation.accept`); `FAILED`
        where the largest logit is NaN or infinite, or the logprob that was asked for is, or where the row's grammar
        cannot go on (`Matcher.error`)."""
        sampling_rows, speculative = rows, any(row.proposed for row in rows)
        ahead = [i for row in rows for i in range(1 + len(row.proposed))]  # of the sequence's own tokens
        if speculative:
            rows = [row for row in rows for _ in range(1 + len(row.proposed))]
        asked = [i for i, row in enumerate(rows) if row.sequence.request.sampling.logprobs is not None]
        raw = log_softmax(logits[torch.tensor(asked, device=logits.device)]) if asked else None
        self._masks.apply(logits, rows)
        self._mask_early_ends(logits, rows)
        if any(row.sequence.rules is not None for row in rows):
            logits = logits.float()
            adjust(logits, rows)
        tokens = self._draw(logits, rows, ahead)
        logprobs = {} if raw is None else _logprobs(raw, tokens, rows, asked)
        draws = Draws(tokens.tolist(), logprobs)
        return accept(sampling_rows, draws) if speculative else draws

    def _mask_early_ends(self, logits: Tensor, rows: list[Row]) -> None:
        for i, row in enumerate(rows):
            sampling = row.sequence.request.sampling
            if row.sequence.num_generated >= sampling.min_tokens:
                continue
            ends = sampling.end_token_ids(self._eos)
            allowed = [token_id for token_id in ends if token_id < self._vocab_size]
            if allowed:
                logits[i, allowed] = float("-inf")

    def _draw(self, logits: Tensor, rows: list[Row], ahead: list[int]) -> Tensor:
        """`[S]` token ids, each from its row's own distribution; logits `[S, vocab]` are overwritten. `ahead`: how
        many tokens each draw stands behind those that its sequence has."""
        device, params = logits.device, [row.sequence.request.sampling for row in rows]
        seeds = [row.sequence.seed for row in rows]
        positions = [len(row.sequence.token_ids) + i for row, i in zip(rows, ahead, strict=True)]
        heat = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
        if unlikely := [i for i, p in enumerate(params) if p.min_p and not p.greedy]:
            index = torch.tensor(unlikely, device=device)
            min_p = torch.tensor([params[i].min_p for i in unlikely], dtype=torch.float64, device=device)
            logits[index] = _without_unlikely(logits[index], heat[index], min_p)
        narrowed = [i for i, p in enumerate(params) if (p.top_k or p.top_p < 1.0) and not p.greedy]
        index = torch.tensor(narrowed, dtype=torch.int64, device=device)
        tokens = self._sample(
            logits,
            heat.index_fill(0, index, 0.0) if narrowed else heat,  # the greedy token says whether they fail
            torch.tensor(seeds, device=device),
            torch.tensor(positions, device=device),
        )
        if narrowed:
            picked = logits[index].float()  # [n, vocab]
            top = picked.amax(dim=1, keepdim=True).double()
            u = uniforms([seeds[i] for i in narrowed], [positions[i] for i in narrowed])
            top_k = torch.tensor([params[i].top_k for i in narrowed], device=device)
            top_p = torch.tensor([params[i].top_p for i in narrowed], dtype=torch.float64, device=device)
            found = _draw_narrowed(picked, top, heat[index], torch.from_numpy(u).to(device), top_k, top_p)
            tokens[index] = torch.where(tokens[index] == FAILED, FAILED, found)
        return tokens


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


def _without_unlikely(logits: Tensor, heat: Tensor, min_p: Tensor) -> Tensor:
    """Min-p: logits `[n, vocab]`, of which tokens less likely than that share of the likeliest are -inf.
    heat and min_p `[n]`, float64; an exponential of 0 is 1, so the likeliest always stays."""
    top = logits.amax(dim=1, keepdim=True).double()
    shares = ((logits.double() - top) / heat[:, None]).exp_()
    return logits.masked_fill(shares < min_p[:, None], float("-inf"))


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
