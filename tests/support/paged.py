"""A random paged cache with rows of queries on it, and what attention over it must give.

Owns the layout as the contract in `kernels` writes it, filled without any kernel. Slots that no context covers
are NaN. Knows no model and no set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import Attention, Kernels, PagedKV, SharedPrefixes

NAN = float("nan")
# contexts of rows with one query each, and groups of those rows that share so many tokens
Layout = tuple[list[int], list[tuple[list[int], int]]]


@dataclass
class Paged:
    q: Tensor
    cache: PagedKV
    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor
    how: Attention
    keys: list[Tensor]  # per row [context, hk, d]: what the stored values mean, in fp64
    values: list[Tensor]

    def run(self, kernels: Kernels) -> Tensor:
        return kernels.paged_attention(
            self.q,
            laid_out(self.cache, kernels),
            self.page_table,
            self.query_start,
            self.context_lens,
            self.how,
        )

    def only(self, row: int, first: int, last: int) -> Paged:
        """The queries `first:last` of one row alone, as a chunked run would ask for them."""
        start = int(self.query_start[row])
        count = int(self.query_start[row + 1]) - start
        return replace(
            self,
            q=self.q[start + first : start + last],
            page_table=self.page_table[row : row + 1].contiguous(),
            query_start=torch.tensor([0, last - first], dtype=torch.int32),
            context_lens=self.context_lens[row : row + 1] - (count - last),
            keys=self.keys[row : row + 1],
            values=self.values[row : row + 1],
        )

    def spoil(
        self, kernels: Kernels, row: int, tokens: Iterable[int], *, keys: bool, values: bool, by: float = NAN
    ) -> Paged:
        """A copy for which a row's K, V or both of some tokens were not finite when the set stored them."""
        table, page_size = self.page_table[row], self.cache.keys.shape[3]
        slots = torch.tensor(
            [int(table[t // page_size]) * page_size + t % page_size for t in tokens], dtype=torch.int64
        )
        _, kv_heads, dim, _ = self.cache.keys.shape
        k, v = (
            torch.full((len(slots), kv_heads, dim), by if spoilt else 1.0, dtype=self.q.dtype)
            for spoilt in (keys, values)
        )
        parts = (self.cache.keys, self.cache.values, self.cache.key_scales, self.cache.value_scales)
        cache = laid_out(PagedKV(*(None if part is None else part.clone() for part in parts)), kernels)
        kernels.store_kv(k, v, cache, slots)
        return replace(self, cache=cache)

    def forget(self, row: int) -> Paged:
        """A copy whose page table holds no page at all where no query of the row sees a token."""
        table, page_size = self.page_table.clone(), self.cache.keys.shape[3]
        count = int(self.query_start[row + 1] - self.query_start[row])
        context = int(self.context_lens[row])
        first = context - count - (self.how.window or context) + 1
        table[row, : max(0, first) // page_size] = 2**30
        table[row, -(-context // page_size) :] = 2**30
        return replace(self, page_table=table)


def paged(
    rows: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    dtype: torch.dtype,
    storage: torch.dtype | None = None,
    how: Attention | None = None,
    padding: int = 0,
    seed: int = 0,
) -> Paged:
    """`rows`: (query tokens, context tokens) each. `storage`: of a cache of 8 bits. `how`: None is plain."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // page_size) for _, context in rows]
    num_pages = sum(needed) + 3
    order = torch.randperm(num_pages, generator=generator)
    table = torch.zeros(len(rows), max(needed, default=0), dtype=torch.int32)
    cache = empty_cache(num_pages, kv_heads, dim, page_size, storage or dtype, scaled=storage is not None)
    keys, values, used = [], [], 0
    for row, (_, context) in enumerate(rows):
        table[row, : needed[row]] = order[used : used + needed[row]]
        used += needed[row]
        (k, k_scales), (v, v_scales) = (
            _stored(context, kv_heads, dim, dtype, storage, generator) for _ in range(2)
        )
        for t in range(context):
            page, offset = int(table[row, t // page_size]), t % page_size
            cache.keys[page, :, :, offset] = k[t]
            cache.values[page, :, offset] = v[t]
            if cache.key_scales is not None and cache.value_scales is not None:
                cache.key_scales[page, :, offset] = k_scales[t]
                cache.value_scales[page, :, offset] = v_scales[t]
        keys.append(k.double() * k_scales.double()[:, :, None])
        values.append(v.double() * v_scales.double()[:, :, None])
    counts = torch.tensor([0] + [n for n, _ in rows])
    total = int(counts.sum()) + padding
    wide = torch.randn(total, heads + 2, dim, generator=generator).to(dtype)
    return Paged(
        q=wide[:, :heads],  # strided, as a view of the merged q, k, v is
        cache=cache,
        page_table=table,
        query_start=counts.cumsum(0).int(),
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
        how=how or Attention(dim**-0.5),
        keys=keys,
        values=values,
    )


def hinted(
    layout: Layout,
    *,
    heads: int,
    kv_heads: int = 1,
    dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype | None = None,
    how: Attention | None = None,
    padding: int = 0,
) -> tuple[Paged, SharedPrefixes]:
    """Rows of one query each that share prefixes, and the hint that says so."""
    contexts, groups = layout
    case = paged(
        [(1, context) for context in contexts],
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        dtype=dtype,
        storage=storage,
        how=how,
        padding=padding,
    )
    return sharing(case, groups, len(contexts) + padding)


def sharing(
    case: Paged, groups: list[tuple[list[int], int]], most_members: int
) -> tuple[Paged, SharedPrefixes]:
    """`groups`: (rows, tokens) each. A copy whose rows share the pages that hold those tokens: the first row's, which
    has so many. Its table, starts and lengths stay as they are; the hint says 2^30 where nobody should look."""
    table, page_size = case.page_table.clone(), case.cache.keys.shape[3]
    keys, values = list(case.keys), list(case.values)
    tokens, members, starts = torch.zeros(len(keys), dtype=torch.int32), [], [0]
    for rows, shared in groups:
        pages = -(-shared // page_size)
        for row in rows:
            count = min(pages * page_size, keys[rows[0]].shape[0], keys[row].shape[0])
            held = -(-count // page_size)
            table[row, :held] = table[rows[0], :held]
            keys[row] = torch.cat((keys[rows[0]][:count], keys[row][count:]))
            values[row] = torch.cat((values[rows[0]][:count], values[row][count:]))
            tokens[row] = shared
        members += rows
        starts.append(len(members))
    members += [2**30] * (most_members - len(members))
    hint = SharedPrefixes(tokens, *(torch.tensor(one, dtype=torch.int32) for one in (members, starts)))
    return replace(case, page_table=table, keys=keys, values=values), hint


def empty_cache(
    pages: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, *, scaled: bool
) -> PagedKV:
    """All NaN; int8, which has no NaN, is 99 under scales of NaN."""
    fill = 99 if dtype == torch.int8 else NAN
    scales = [torch.full((pages, kv_heads, page_size), NAN, dtype=torch.bfloat16) for _ in range(2 * scaled)]
    return PagedKV(
        torch.full((pages, kv_heads, dim, page_size), fill, dtype=torch.float32).to(dtype),
        torch.full((pages, kv_heads, page_size, dim), fill, dtype=torch.float32).to(dtype),
        *scales,
    )


def laid_out(cache: PagedKV, kernels: Kernels) -> PagedKV:
    """The same numbers with K as the set takes it."""
    if not kernels.keys_by_token or cache.keys.stride(2) == 1:
        return cache
    return replace(cache, keys=cache.keys.transpose(2, 3).contiguous().transpose(2, 3))


def _stored(
    context: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    storage: torch.dtype | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Random vectors of about unit spread [context, hk, d], and their scales [context, hk]."""
    x = torch.randn(context, kv_heads, dim, generator=generator)
    if storage is None:
        return x.to(dtype), torch.ones(context, kv_heads)
    scales = (torch.rand(context, kv_heads, generator=generator) * 0.04 + 0.01).bfloat16()
    return (x * 40).clamp(-127, 127).to(storage), scales


def naive_attention(case: Paged) -> Tensor:
    """A plain loop in fp64."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    group, how = case.q.shape[1] // case.cache.keys.shape[1], case.how
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        start, end = int(case.query_start[row]), int(case.query_start[row + 1])
        for t in range(start, end):
            position = keys.shape[0] - (end - t)
            first = 0 if how.window is None else max(0, position - how.window + 1)
            k, v = keys[first : position + 1], values[first : position + 1]
            q = case.q[t].double().unflatten(0, (-1, group))  # [hk, group, d]
            scores = torch.einsum("hgd,lhd->hgl", q, k) * how.scale
            if how.softcap is not None:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            if how.slopes is not None:
                scores += how.slopes.double().view(-1, group, 1) * torch.arange(first - position, 1)
            weights = torch.softmax(scores, dim=-1)
            if how.sinks is not None:  # as a key that is not there, apart from how any set computes it
                sink = how.sinks.double().view(-1, group, 1)
                weights *= torch.sigmoid(torch.logsumexp(scores, dim=-1, keepdim=True) - sink)
            out[t] = torch.einsum("hgl,lhd->hgd", weights, v).flatten(0, 1)
    return out
