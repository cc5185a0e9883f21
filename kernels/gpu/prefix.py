"""Attention of many rows over a prefix that they share: its K and V are read once for a block of them.

A cascade (Juravsky et al. 2024, "Hydragen"; Ye et al. 2024, FlashInfer): for the splits that lie wholly inside the
shared tokens of a group of rows, `prefix` writes what `single` would have written for each of them, up to rounding,
and `reduce` merges all splits of a row as usual. Both kernels ask one rule which splits these are (`prefix_holds`),
by what is known of the row itself, so each split is written by exactly one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.splits import prefix_holds, split_start
from kernels.gpu.walk import slope_of, walk


@triton.jit(do_not_specialize=["table_stride", "num_splits", "num_groups"])
def prefix(
    q, keys, values, key_scales, value_scales, slopes, page_table, context_lens, parts, part_stats,
    shared, members, starts, num_groups, q_stride, q_head_stride, table_stride, num_splits, scale, cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr,
    DIM: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Rows of one query each, QUERIES of one group a block. Programs [members // QUERIES + groups, hk · blocks of
    HEADS heads, splits - 1]: a row's last split is never shared. GROUPS: at least num_groups, a power of two.

    Group g has the blocks from starts[g] // QUERIES + g on, which are enough for any sizes. shared [R], members and
    starts [groups + 1] as in `SharedPrefixes`; parts [R, hq, splits, DIM] and part_stats [R, hq, splits, 2] as in
    `single`.
    """
    block, split = tl.program_id(0), tl.program_id(2)
    g = tl.arange(0, GROUPS)
    begins = tl.load(starts + g, mask=g < num_groups, other=0)
    own = (g < num_groups) & (begins // QUERIES + g <= block)
    group = tl.max(tl.where(own, g, 0))  # the last whose blocks begin at or before this one
    start, end = tl.load(starts + group), tl.load(starts + group + 1)
    first = start + (block - start // QUERIES - group) * QUERIES
    if first >= end:
        return

    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // blocks
    m, channel = tl.arange(0, M), tl.arange(0, WIDTH)
    member, in_group = first + m // HEADS, tl.program_id(1) % blocks * HEADS + m % HEADS
    valid = (m < HEADS * QUERIES) & (member < end) & (in_group < GROUP)
    head, row = kv_head * GROUP + in_group, tl.load(members + member, mask=valid, other=0)
    context = tl.load(context_lens + row, mask=valid, other=0)
    valid &= prefix_holds(split, tl.load(shared + row, mask=valid, other=0), context)
    leader = tl.max(tl.where(valid, row, -1))  # any of those that see the split: their pages are the same
    if leader < 0:
        return
    held = valid[:, None] & (channel < DIM)[None, :]
    places = row[:, None].to(tl.int64) * q_stride + head[:, None] * q_head_stride + channel[None, :]
    query = tl.load(q + places, mask=held, other=0.0)
    slope = None
    if slopes is not None:
        slope = slope_of(slopes, head, valid)
    if key_scales is not None:
        key_scales += kv_head * PAGE
        value_scales += kv_head * PAGE
    low, high = split_start(split), split_start(split + 1)
    top, total, mixed = walk(
        tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, WIDTH), tl.float32),
        query, context - 1, slope, low, high, low, high,
        keys + kv_head * (DIM * PAGE), values + kv_head * (DIM * PAGE), key_scales, value_scales,
        page_table + leader.to(tl.int64) * table_stride, scale, cap, None,
        KV_HEADS, DIM, PAGE, WIDTH, TILE, False, True,
    )  # fmt: skip
    part = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * num_splits + split
    tl.store(parts + part[:, None] * DIM + channel[None, :], mixed, mask=held)
    tl.store(part_stats + part * 2, top, mask=valid)
    tl.store(part_stats + part * 2 + 1, total, mask=valid)
