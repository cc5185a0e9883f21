"""Attention over pages: one operation for rows of one query, of many, and both.

Two kernels share one walk over the context (`walk`). `many` takes rows with several queries, a block of them per
program; `single` takes rows with one query, a split of the context per program, and `reduce` merges the splits. Each
looks up its row and leaves at once if the row is the other's, so the host launches by T, R and P alone and reads
nothing from the device. Rows of a block are pairs of query and head: all heads that read one kv head share its tiles.
Splits that many rows share may come from a third kernel (`prefix`): `single` leaves them out.

Integers that change from step to step are not specialised: nothing may be compiled for one more length.

A token's bits depend on its own row alone: tiles and splits lie at fixed positions of the context (`splits`), `many`
merges the same splits as `reduce` does, and all choices depend on shapes of the model alone (`tiles`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.groups import group_of
from kernels.gpu.splits import merged, prefix_holds, split_of, split_start
from kernels.gpu.walk import slope_of, walk, with_sink


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def single(
    q, keys, values, key_scales, value_scales, slopes, sinks, page_table, query_start, context_lens, out,
    parts, part_stats, shared, q_stride, q_head_stride, table_stride, num_splits, scale, cap, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, M: tl.constexpr,
    DIM: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of one query. Programs [R, hk · blocks of HEADS heads, splits]. query_start None: row r has query r, and
    one with a context of 0 is padding, whose result is zero. shared [R]: the splits that `prefix` writes, or None.

    parts [R, hq, splits, DIM] and part_stats [R, hq, splits, 2] (maximum, sum), fp32: of rows with more than
    one split. Such a row's own splits are written, and no others.
    """
    row, split = tl.program_id(0), tl.program_id(2)
    start = row
    if query_start is not None:
        start = tl.load(query_start + row)
        if tl.load(query_start + row + 1) - start != 1:
            return
    context = tl.load(context_lens + row)
    if shared is not None:
        tokens = tl.load(shared + row)
        if prefix_holds(split, tokens, context):
            return
    begin = 0
    if window is not None:
        begin = tl.maximum(context - window, 0)
    low, high = tl.maximum(split_start(split), begin), tl.minimum(split_start(split + 1), context)

    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // blocks
    m, channel = tl.arange(0, M), tl.arange(0, WIDTH)
    in_group = tl.program_id(1) % blocks * HEADS + m
    head, valid = kv_head * GROUP + in_group, (m < HEADS) & (in_group < GROUP)
    held = valid[:, None] & (channel < DIM)[None, :]
    if low >= high:
        if (context == 0) & (split == 0):
            target = out + (start.to(tl.int64) * (KV_HEADS * GROUP) + head[:, None]) * DIM + channel[None, :]
            tl.store(target, tl.zeros((M, WIDTH), out.dtype.element_ty), mask=held)
        return
    places = start.to(tl.int64) * q_stride + head[:, None] * q_head_stride + channel[None, :]
    query = tl.load(q + places, mask=held, other=0.0)
    slope = None
    if slopes is not None:
        slope = slope_of(slopes, head, valid)
    if key_scales is not None:
        key_scales += kv_head * PAGE
        value_scales += kv_head * PAGE
    top, total, mixed = walk(
        tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M, WIDTH), tl.float32),
        query, tl.zeros((M,), tl.int32) + (context - 1), slope, low // TILE * TILE, high, low, high,
        keys + kv_head * (DIM * PAGE), values + kv_head * (DIM * PAGE), key_scales, value_scales,
        page_table + row.to(tl.int64) * table_stride, scale, cap, window,
        KV_HEADS, DIM, PAGE, WIDTH, TILE, True, False,
    )  # fmt: skip
    if (low == begin) & (high == context):
        if sinks is not None:
            total = with_sink(top, total, sinks, head, valid)
        target = out + (start.to(tl.int64) * (KV_HEADS * GROUP) + head[:, None]) * DIM + channel[None, :]
        tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=held)
    else:
        part = (row.to(tl.int64) * (KV_HEADS * GROUP) + head) * num_splits + split
        tl.store(parts + part[:, None] * DIM + channel[None, :], mixed, mask=held)
        tl.store(part_stats + part * 2, top, mask=valid)
        tl.store(part_stats + part * 2 + 1, total, mask=valid)


@triton.jit(do_not_specialize=["num_splits"])
def reduce(
    parts, part_stats, sinks, query_start, context_lens, out, num_splits, window,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Merges what `single` and `prefix` left of rows with more than one split. Programs [R, hq]; HEADS is hq."""
    row, head = tl.program_id(0), tl.program_id(1)
    start = row
    if query_start is not None:
        start = tl.load(query_start + row)
        if tl.load(query_start + row + 1) - start != 1:
            return
    context = tl.load(context_lens + row)
    if context == 0:
        return
    begin = 0
    if window is not None:
        begin = tl.maximum(context - window, 0)
    first, last = split_of(begin), split_of(context - 1)
    if first == last:
        return
    channel = tl.arange(0, WIDTH)
    top, total = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    mixed = tl.zeros((1, WIDTH), tl.float32)
    part = (row.to(tl.int64) * HEADS + head) * num_splits
    for split in range(first, last + 1):
        stats = part_stats + (part + split) * 2 + tl.arange(0, 1)
        values = tl.load(parts + (part + split) * DIM + channel, mask=channel < DIM, other=0.0)
        top, total, mixed = merged(top, total, mixed, tl.load(stats), tl.load(stats + 1), values[None, :])
    if sinks is not None:
        total = with_sink(top, total, sinks, head + tl.arange(0, 1), True)
    target = out + (start.to(tl.int64) * HEADS + head) * DIM + channel[None, :]
    tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=(channel < DIM)[None, :])


@triton.jit
def _target(out, first, inner, head, channel, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Where a block that begins at token `first` leaves its results, [M, WIDTH]; its offsets fit in 32 bits."""
    offset = (inner * HEADS + head)[:, None] * DIM + channel[None, :]
    return out + first.to(tl.int64) * (HEADS * DIM) + offset


@triton.jit(do_not_specialize=["table_stride", "num_tokens", "num_rows"])
def many(
    q, keys, values, key_scales, value_scales, slopes, sinks, page_table, query_start, context_lens, out,
    q_stride, q_head_stride, table_stride, num_tokens, num_rows, scale, cap, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, M: tl.constexpr,
    DIM: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of more than one query, QUERIES of them a block, and zeros for padding tokens.

    Programs [T // QUERIES + R + 1, hk · blocks of HEADS heads]: blocks as `groups` has them, padding being row R.
    """
    block = tl.program_id(0)
    row = group_of(block, query_start, num_rows + 1, QUERIES)
    start, end = tl.load(query_start + row), num_tokens
    if row < num_rows:
        end = tl.load(query_start + row + 1)
    first = start + (block - start // QUERIES - row) * QUERIES
    if first >= end:
        return

    blocks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(1) // blocks
    m, channel = tl.arange(0, M), tl.arange(0, WIDTH)
    inner, in_group = m // HEADS, tl.program_id(1) % blocks * HEADS + m % HEADS
    head = kv_head * GROUP + in_group
    valid = (m < HEADS * QUERIES) & (inner < end - first) & (in_group < GROUP)
    held = valid[:, None] & (channel < DIM)[None, :]
    if row == num_rows:
        zeros = tl.zeros((M, WIDTH), out.dtype.element_ty)
        tl.store(_target(out, first, inner, head, channel, KV_HEADS * GROUP, DIM), zeros, mask=held)
        return
    if end - start == 1:
        return

    places = (inner * q_stride + head * q_head_stride)[:, None] + channel[None, :]
    query = tl.load(q + first.to(tl.int64) * q_stride + places, mask=held, other=0.0)
    slope = None
    if slopes is not None:
        slope = slope_of(slopes, head, valid)
    if key_scales is not None:
        key_scales += kv_head * PAGE
        value_scales += kv_head * PAGE
    keys += kv_head * (DIM * PAGE)
    values += kv_head * (DIM * PAGE)
    table = page_table + row.to(tl.int64) * table_stride

    # tokens that some query of the block sees: begin until stop; that all see: the tiles from full_begin to full_stop
    context = tl.load(context_lens + row)
    origin = first + context - end  # position of the block's first query
    position, stop = origin + inner, tl.minimum(origin + QUERIES, context)
    begin, full_begin, full_stop = 0, 0, (origin + 1) // TILE * TILE
    if window is not None:
        begin = tl.maximum(origin - window + 1, 0)
        full_begin = (tl.maximum(stop - window, 0) + TILE - 1) // TILE * TILE
    top, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, WIDTH), tl.float32)
    for split in range(split_of(begin), split_of(stop - 1) + 1):
        low, high = split_start(split), tl.minimum(split_start(split + 1), stop)
        a, b = low, low
        if window is not None:
            low = tl.maximum(low, begin)
            a = low // TILE * TILE
            b = tl.minimum(tl.maximum(full_begin, a), high)
        c = tl.maximum(tl.minimum(full_stop, high), b)
        part_top, part_total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        part = tl.zeros((M, WIDTH), tl.float32)
        if window is not None:
            part_top, part_total, part = walk(
                part_top, part_total, part, query, position, slope, a, b, low, high,
                keys, values, key_scales, value_scales, table, scale, cap, window,
                KV_HEADS, DIM, PAGE, WIDTH, TILE, True, True,
            )  # fmt: skip
        part_top, part_total, part = walk(
            part_top, part_total, part, query, position, slope, b, c, low, high,
            keys, values, key_scales, value_scales, table, scale, cap, window,
            KV_HEADS, DIM, PAGE, WIDTH, TILE, False, True,
        )  # fmt: skip
        part_top, part_total, part = walk(
            part_top, part_total, part, query, position, slope, c, high, low, high,
            keys, values, key_scales, value_scales, table, scale, cap, window,
            KV_HEADS, DIM, PAGE, WIDTH, TILE, True, True,
        )  # fmt: skip
        top, total, mixed = merged(top, total, mixed, part_top, part_total, part)
    if sinks is not None:
        total = with_sink(top, total, sinks, head, valid)
    # made anew, so that no registers hold it while the block walks
    target = _target(out, first, inner, head, channel, KV_HEADS * GROUP, DIM)
    tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=held)
