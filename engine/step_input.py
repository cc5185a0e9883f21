"""StepInput: the tensors of one step, made of a `Plan`.

Owns the translation of rows, pages and counts into flat tensors. Knows no weights. Built in numpy, because
a step of 96 rows must cost microseconds per row, then handed to torch in one go.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.plan import Plan, Row
from engine.shared_prefixes import shared_prefixes
from engine.staging import staged
from kernels import SharedPrefixes, Sharing


@dataclass(frozen=True, slots=True)
class StepInput:
    """T tokens, R rows, S rows that sample, N positions that are scored; T, S and N with their padding."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64; -1 for padding
    page_table: Tensor  # [R, P] int32
    query_start: Tensor | None  # [R + 1] int32; None: one token each row, and T = R
    context_lens: Tensor  # [R] int32, this step's tokens included
    # [S] int64: tokens whose logits draw the next, proposed ones behind a row's last; padding repeats token 0. None:
    # all tokens are such, in their order
    logit_rows: Tensor | None
    scored_rows: Tensor  # [N] int64: the same for logits that score a prompt's next token (`Row.scored`)
    shared: SharedPrefixes | None = None  # where rows of one token share pages, if attention is to be told
    # [W] int64, ascending: the tokens of `logit_rows` and `scored_rows`, where they are few, and padding of token 0.
    # The last block need make no others: all that later steps want of those are its keys and values. None: all.
    read: Tensor | None = None

    @classmethod
    def build(
        cls,
        plan: Plan,
        page_size: int,
        *,
        row_multiple: int = 1,
        device: str = "cpu",
        sharing: Sharing | None = None,
    ) -> StepInput:
        """`row_multiple`: T, S and N are padded up to it (see `runner` on determinism). `sharing`: the kernels', if
        they are to be told which rows share a prefix."""
        rows = plan.rows
        if rows and all(row.num_tokens == 1 and not row.proposed for row in rows):
            tokens = _single_tokens(rows, page_size, row_multiple)
        else:
            tokens = _many_tokens(rows, page_size, row_multiple)
        sampled: list[int] = []
        scored: list[int] = []
        start = 0
        tensor = partial(staged, device=device)
        for row in rows:
            if row.samples:
                sampled += range(start + row.num_tokens - 1, start + row.num_queries)
            scored += (start + position - row.sequence.num_computed for position in row.scored)
            start += row.num_queries

        def padded(tokens: list[int]) -> np.ndarray:
            rows = np.zeros(_round_up(len(tokens), row_multiple), dtype=np.int64)
            rows[: len(tokens)] = tokens
            return rows

        read = sampled + scored or [0]
        is_few = 2 * _round_up(len(read), row_multiple) <= len(tokens.token_ids)

        return cls(
            token_ids=tensor(tokens.token_ids),
            positions=tensor(tokens.positions),
            slots=tensor(tokens.slots),
            page_table=tensor(tokens.page_table),
            query_start=None if len(tokens.token_ids) == len(rows) else tensor(tokens.query_start),
            context_lens=tensor(tokens.context_lens),
            logit_rows=tensor(padded(sampled)),
            scored_rows=tensor(padded(scored)),
            shared=_shared(plan, page_size, sharing, device) if sharing is not None else None,
            read=tensor(np.sort(padded(read))) if is_few else None,
        )


class _Tokens(NamedTuple):
    """As in `StepInput`."""

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    page_table: np.ndarray
    query_start: np.ndarray
    context_lens: np.ndarray


def _single_tokens(rows: tuple[Row, ...], page_size: int, row_multiple: int) -> _Tokens:
    """Where each row has one token, its last. Most steps are so, and with one row as good as nothing else is left of
    them but reading weights: here lists cost less than arrays."""
    sequences = [row.sequence for row in rows]
    at = [one.num_computed for one in sequences]
    token_ids = [one.token_ids[position] for one, position in zip(sequences, at, strict=True)]
    slots = [
        one.pages[position // page_size] * page_size + position % page_size
        for one, position in zip(sequences, at, strict=True)
    ]
    padding = _round_up(len(rows), row_multiple) - len(rows)
    page_table = np.zeros((len(rows), max(at) // page_size + 1), dtype=np.int32)
    for r, (one, position) in enumerate(zip(sequences, at, strict=True)):
        used = position // page_size + 1
        page_table[r, :used] = one.pages[:used]
    return _Tokens(
        np.array(token_ids + [0] * padding, dtype=np.int64),
        np.array(at + [0] * padding, dtype=np.int64),
        np.array(slots + [-1] * padding, dtype=np.int64),
        page_table,
        np.arange(len(rows) + 1, dtype=np.int32),
        np.array([position + 1 for position in at], dtype=np.int32),
    )


def _many_tokens(rows: tuple[Row, ...], page_size: int, row_multiple: int) -> _Tokens:
    """Where rows have any number of tokens."""
    counts = np.array([row.num_queries for row in rows], dtype=np.int64)
    query_start = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(counts, out=query_start[1:])
    total = int(query_start[-1])
    padded = _round_up(total, row_multiple)

    token_ids = np.zeros(padded, dtype=np.int64)
    positions = np.zeros(padded, dtype=np.int64)
    slots = np.full(padded, -1, dtype=np.int64)
    computed = np.array([row.sequence.num_computed for row in rows], dtype=np.int64)
    used = -(-(computed + counts) // page_size)  # pages each row reads
    page_table = np.zeros((len(rows), int(used.max(initial=0))), dtype=np.int64)
    for r, row in enumerate(rows):
        sequence, start, end = row.sequence, int(query_start[r]), int(query_start[r + 1])
        first = sequence.num_computed
        given = start + row.num_tokens
        token_ids[start:given] = sequence.token_ids[first : first + row.num_tokens]
        token_ids[given:end] = row.proposed
        page_table[r, : used[r]] = sequence.pages[: used[r]]

    owner = np.repeat(np.arange(len(rows)), counts)  # row of each token
    at = np.arange(total) - query_start[owner] + computed[owner]
    positions[:total] = at
    slots[:total] = page_table[owner, at // page_size] * page_size + at % page_size
    return _Tokens(
        token_ids,
        positions,
        slots,
        page_table.astype(np.int32),
        query_start.astype(np.int32),
        (computed + counts).astype(np.int32),
    )


def _shared(plan: Plan, page_size: int, sharing: Sharing, device: str) -> SharedPrefixes | None:
    """Which rows of one token share a prefix; None: no rows do."""
    tables = [row.sequence.pages if row.num_queries == 1 else () for row in plan.rows]
    groups = shared_prefixes(tables, page_size, sharing)
    if not groups:
        return None
    tokens = np.zeros(len(plan.rows), dtype=np.int32)
    for group in groups:
        tokens[group.rows] = group.tokens
    members = np.array([row for group in groups for row in group.rows], dtype=np.int32)
    starts = np.cumsum([0, *(len(group.rows) for group in groups)], dtype=np.int32)
    return SharedPrefixes(staged(tokens, device), staged(members, device), staged(starts, device))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
