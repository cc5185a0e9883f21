"""The launch of attention: shapes in, kernels with their grids and tiles out. Reads nothing from the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels import Attention, PagedKV, SharedPrefixes
from kernels.gpu.architectures import capability
from kernels.gpu.attention import many, reduce, single
from kernels.gpu.cache import pages_of
from kernels.gpu.prefix import prefix
from kernels.gpu.splits import splits_for
from kernels.gpu.tiles import WIDEST, Tiles, decode_rows, tiles_for
from kernels.gpu.walk import LOG2_E

# Channels of a tile of 8 bits: with 32 of them and queries of 16 bits, Triton 3.6 made wrong products on an H200.
LEAST_IN_8_BITS = 64


class _Call(NamedTuple):
    """What all kernels of one call take. `window` None: none that hides a token. `scale` and `cap` are for scores in
    base 2. `shapes` and `exact`: options of every launch by shapes, and by the dtype."""

    q: Tensor
    out: Tensor
    pages: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    page_table: Tensor
    context_lens: Tensor
    how: Attention
    window: int | None
    scale: float
    cap: float | None
    tiles: Tiles
    shapes: dict[str, int]
    exact: dict[str, bool]

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.q.stride(0), self.q.stride(1), self.page_table.stride(0)


class _Blocks(NamedTuple):
    """Of rows of several queries, or of queries of several rows: `m` pairs of query and head, of `heads` heads and
    `queries` queries; `number` of them side by side hold all heads."""

    m: int
    heads: int
    queries: int
    number: int

    @classmethod
    def of(cls, m: int, group: int, kv_heads: int) -> _Blocks:
        heads = min(group, m)
        return cls(m, heads, m // heads, kv_heads * triton.cdiv(group, heads))


def paged_attention(
    q: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_start: Tensor | None,
    context_lens: Tensor,
    how: Attention,
    shared: SharedPrefixes | None = None,
) -> Tensor:
    tokens, heads, dim = q.shape
    most_pages, kv_heads, page_size = page_table.shape[1], cache.keys.shape[1], cache.keys.shape[3]
    scaled = cache.key_scales is not None
    width = max(LEAST_IN_8_BITS if scaled else 16, triton.next_power_of_2(dim))
    if width > WIDEST:
        raise ValueError(f"the triton kernels attend with heads of at most {WIDEST} channels, not {dim}")
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens or not most_pages:  # nobody sees anything
        return out.zero_()

    group, most_tokens = heads // kv_heads, most_pages * page_size
    fp32 = q.dtype == torch.float32
    scale, cap = how.scale * LOG2_E.value, None
    if how.softcap is not None:
        scale, cap = how.scale / how.softcap, how.softcap * LOG2_E.value
    call = _Call(
        q=q,
        out=out,
        pages=pages_of(cache),
        page_table=page_table,
        context_lens=context_lens,
        how=how,
        window=None if how.window is None or how.window >= most_tokens else how.window,
        scale=scale,
        cap=cap,
        tiles=tiles_for(capability(q.device), width, fp32=fp32, scaled=scaled),
        shapes={"DIM": dim, "PAGE": page_size, "WIDTH": width, "KV_HEADS": kv_heads, "GROUP": group},
        # whether a product is fused with the sum behind it differed between the walks of fp32
        exact={"enable_fp_fusion": False} if fp32 else {},
    )
    single_blocks = _Blocks.of(decode_rows(group), group, kv_heads)
    blocks = _Blocks.of(max(call.tiles.rows, single_blocks.m), group, kv_heads)
    splits = splits_for(most_tokens)
    if query_start is not None or call.window is not None or splits == 1:
        shared = None
    if page_table.shape[0]:
        _single_queries(call, query_start, shared, splits, single_blocks, blocks)
    if query_start is not None:
        _many_queries(call, query_start, blocks)
    return out


def _single_queries(
    call: _Call,
    query_start: Tensor | None,
    shared: SharedPrefixes | None,
    splits: int,
    single_blocks: _Blocks,
    blocks: _Blocks,
) -> None:
    """Rows of one query: what they share, if anything, then the splits of each, then their sums."""
    q, how, tiles, (rows, heads, dim) = (
        call.q,
        call.how,
        call.tiles,
        (len(call.page_table), *call.q.shape[1:]),
    )
    # of rows with one split nothing comes here; the caching allocator gives every layer the same memory
    apart = rows if splits > 1 else 0
    parts = torch.empty((apart, heads, splits, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((apart, heads, splits, 2), dtype=torch.float32, device=q.device)
    if shared is not None:
        groups = shared.starts.shape[0] - 1
        prefix[(shared.members.shape[0] // blocks.queries + groups, blocks.number, splits - 1)](
            q, *call.pages, how.slopes, call.page_table, call.context_lens, parts, stats,
            shared.tokens, shared.members, shared.starts, groups, *call.strides, splits, call.scale, call.cap,
            **call.shapes, HEADS=blocks.heads, QUERIES=blocks.queries, M=blocks.m, TILE=tiles.tokens,
            GROUPS=triton.next_power_of_2(groups), num_warps=tiles.warps, num_stages=tiles.stages, **call.exact,
        )  # fmt: skip
    single[(rows, single_blocks.number, splits)](
        q, *call.pages, how.slopes, how.sinks, call.page_table, query_start, call.context_lens, call.out,
        parts, stats, None if shared is None else shared.tokens, *call.strides, splits,
        call.scale, call.cap, call.window,
        **call.shapes, HEADS=single_blocks.heads, M=single_blocks.m, TILE=tiles.tokens,
        num_warps=tiles.decode_warps, num_stages=tiles.decode_stages, **call.exact,
    )  # fmt: skip
    if splits > 1:
        reduce[(rows, heads)](
            parts, stats, how.sinks, query_start, call.context_lens, call.out, splits, call.window,
            HEADS=heads, DIM=dim, WIDTH=call.shapes["WIDTH"], **call.exact,
        )  # fmt: skip


def _many_queries(call: _Call, query_start: Tensor, blocks: _Blocks) -> None:
    """Rows of several queries, and zeros for padding."""
    how, tiles, tokens, rows = call.how, call.tiles, call.q.shape[0], call.page_table.shape[0]
    many[(tokens // blocks.queries + rows + 1, blocks.number)](
        call.q, *call.pages, how.slopes, how.sinks, call.page_table, query_start, call.context_lens, call.out,
        *call.strides, tokens, rows, call.scale, call.cap, call.window,
        **call.shapes, HEADS=blocks.heads, QUERIES=blocks.queries, M=blocks.m, TILE=tiles.tokens,
        num_warps=tiles.warps, num_stages=tiles.stages, **call.exact,
    )  # fmt: skip
