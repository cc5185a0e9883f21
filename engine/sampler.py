"""Sampler: logits to token ids and their logprobs, by each row's own parameters.

Owns masking and the logprobs of what was drawn; the draws, and the filters before them, are the kernel set's, in one
call. Knows no pages and no text. A draw depends on the row's logits, its seed and its position alone: the noise is a
hash, not a stream, and ties are broken by token id, so the crowd in a step changes nothing. A feature that no row
asks for costs nothing.

Order as in vLLM: the grammar's mask (`token_masks`), min_tokens, the request's own rules for logits (`adjust`),
temperature, min-p, top-k, top-p.
Logprobs are taken before all of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.adjust import adjust, pairs_on
from engine.logprobs import token_logprobs
from engine.model_config import ModelConfig
from engine.plan import FAILED, Draws, Row
from engine.request import TokenLogprobs
from engine.speculation import accept
from engine.staging import staged, staged_ints
from engine.token_masks import TokenMasks
from kernels import Filters, Kernels
from kernels.reference import KERNELS as REFERENCE


class Sampler:
    def __init__(self, config: ModelConfig, kernels: Kernels = REFERENCE) -> None:
        self._sample = kernels.sample
        self._normalisers = kernels.normalisers
        self._penalise = kernels.penalise
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
        raw = logits[staged_ints(asked, logits.device)] if asked else None
        self._masks.apply(logits, rows)
        self._mask_early_ends(logits, rows)
        if any(row.sequence.rules is not None for row in rows):
            logits = logits.float()
            adjust(logits, rows, self._penalise)
        tokens = self._draw(logits, rows, ahead)
        logprobs = {} if raw is None else self._logprobs(raw, tokens, rows, asked)
        draws = Draws(tokens.tolist(), logprobs)
        return accept(sampling_rows, draws) if speculative else draws

    def _mask_early_ends(self, logits: Tensor, rows: list[Row]) -> None:
        early: list[tuple[int, list[int]]] = []  # (row, tokens)
        for i, row in enumerate(rows):
            sampling = row.sequence.request.sampling
            if row.sequence.num_generated < sampling.min_tokens:
                ends = sampling.end_token_ids(self._eos)
                early.append((i, [token_id for token_id in ends if token_id < self._vocab_size]))
        if early:
            logits[pairs_on(logits.device, early)] = float("-inf")

    def _draw(self, logits: Tensor, rows: list[Row], ahead: list[int]) -> Tensor:
        """`[S]` token ids, each from its row's own distribution; logits `[S, vocab]`. `ahead`: how many tokens each
        draw stands behind those that its sequence has."""
        params = [row.sequence.request.sampling for row in rows]
        width = len(rows) + len(rows) % 2  # each line begins at an address that kernels call aligned
        numbers = np.zeros((6, width), dtype=np.int64)
        lines = numbers[:, : len(rows)]
        lines[0] = [row.sequence.seed for row in rows]
        lines[1] = [len(row.sequence.token_ids) + i for row, i in zip(rows, ahead, strict=True)]
        lines[2] = [p.top_k for p in params]
        lines[3:].view(np.float64)[:] = np.transpose([(p.temperature, p.top_p, p.min_p) for p in params])
        on_device = staged(numbers, logits.device)[:, : len(rows)]
        seeds, positions, top_k = on_device[:3]
        temperatures, top_p, min_p = on_device[3:].view(torch.float64)
        filters = Filters(top_k, top_p, min_p) if any(p.narrows for p in params) else None
        return self._sample(logits, temperatures, seeds, positions, filters)

    def _logprobs(
        self, raw: Tensor, tokens: Tensor, rows: list[Row], asked: list[int]
    ) -> dict[int, TokenLogprobs]:
        """raw `[len(asked), vocab]`, logits that nothing has been done to, tokens `[S]`. By row, for rows in `asked`
        that did not fail; a row whose logprob is not finite (an infinite logit that min_tokens masked) becomes
        `FAILED` in `tokens`."""
        counts = [rows[i].sequence.request.sampling.logprobs or 0 for i in asked]
        drawn = tokens[staged_ints(asked, tokens.device)]
        made = token_logprobs(raw, drawn, counts, self._normalisers(raw))
        for i, one in zip(asked, made, strict=True):
            if one is None:
                tokens[i] = FAILED
        return {i: one for i, one in zip(asked, made, strict=True) if one is not None}
