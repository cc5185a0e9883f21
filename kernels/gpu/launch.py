"""The launch of attention: shapes in, kernels with their grids and tiles out. Reads nothing from the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels import Attention, PagedKV, SharedPrefixes
from kernels.gpu.architectures import capability
from kernels.gpu.attention import many, reduce, single
from kernels.gpu.cache import pages_of
from kernels.gpu.prefix import prefix
from kernels.gpu.splits import splits_for
from kernels.gpu.tiles import WIDEST, decode_rows, tiles_for
from kernels.gpu.walk import LOG2_E

# Channels of a tile of 8 bits: with 32 of them and queries of 16 bits, Triton 3.6 made wrong products on an H200.
LEAST_IN_8_BITS = 64


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
    rows, most_pages = page_table.shape
    kv_heads, page_size = cache.keys.shape[1], cache.keys.shape[3]
    width = max(16 if cache.key_scales is None else LEAST_IN_8_BITS, triton.next_power_of_2(dim))
    if width > WIDEST:
        raise ValueError(f"the triton kernels attend with heads of at most {WIDEST} channels, not {dim}")
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens or not most_pages:  # nobody sees anything
        return out.zero_()

    group, most_tokens = heads // kv_heads, most_pages * page_size
    scaled = cache.key_scales is not None
    tiles = tiles_for(capability(q.device), width, fp32=q.dtype == torch.float32, scaled=scaled)
    window = None if how.window is None or how.window >= most_tokens else how.window
    scale, cap = how.scale * LOG2_E.value, None  # scores are in base 2
    if how.softcap is not None:
        scale, cap = how.scale / how.softcap, how.softcap * LOG2_E.value
    # whether a product is fused with the sum behind it differed between the walks of fp32
    exact = {"enable_fp_fusion": False} if q.dtype == torch.float32 else {}
    pages = pages_of(cache)
    shapes = {"DIM": dim, "PAGE": page_size, "WIDTH": width, "KV_HEADS": kv_heads, "GROUP": group}

    single_m = decode_rows(group)
    single_heads = min(group, single_m)
    m = max(tiles.rows, single_m)
    together = min(group, m)
    queries, head_blocks = m // together, kv_heads * triton.cdiv(group, together)

    splits = splits_for(most_tokens)
    if query_start is not None or window is not None or splits == 1:
        shared = None
    if rows and splits:
        # of rows with one split nothing comes here; the caching allocator gives every layer the same memory
        apart = rows if splits > 1 else 0
        parts = torch.empty((apart, heads, splits, dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((apart, heads, splits, 2), dtype=torch.float32, device=q.device)
        if shared is not None:
            groups = shared.starts.shape[0] - 1
            prefix[(shared.members.shape[0] // queries + groups, head_blocks, splits - 1)](
                q, *pages, how.slopes, page_table, context_lens, parts, stats,
                shared.tokens, shared.members, shared.starts, groups,
                q.stride(0), q.stride(1), page_table.stride(0), splits, scale, cap,
                **shapes, HEADS=together, QUERIES=queries, M=m, TILE=tiles.tokens,
                GROUPS=triton.next_power_of_2(groups), num_warps=tiles.warps, num_stages=tiles.stages, **exact,
            )  # fmt: skip
        single[(rows, kv_heads * triton.cdiv(group, single_heads), splits)](
            q, *pages, how.slopes, how.sinks, page_table, query_start, context_lens, out, parts, stats,
            None if shared is None else shared.tokens,
            q.stride(0), q.stride(1), page_table.stride(0), splits, scale, cap, window,
            **shapes, HEADS=single_heads, M=single_m, TILE=tiles.tokens,
            num_warps=tiles.decode_warps, num_stages=tiles.decode_stages, **exact,
        )  # fmt: skip
        if splits > 1:
            reduce[(rows, heads)](
                parts, stats, how.sinks, query_start, context_lens, out, splits, window,
                HEADS=heads, DIM=dim, WIDTH=width, **exact,
            )  # fmt: skip

    if query_start is None:
        return out
    many[(tokens // queries + rows + 1, head_blocks)](
        q, *pages, how.slopes, how.sinks, page_table, query_start, context_lens, out,
        q.stride(0), q.stride(1), page_table.stride(0), tokens, rows, scale, cap, window,
        **shapes, HEADS=together, QUERIES=queries, M=m, TILE=tiles.tokens,
        num_warps=tiles.warps, num_stages=tiles.stages, **exact,
    )  # fmt: skip
    return out
