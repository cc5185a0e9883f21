"""The walk of a block of queries over tokens of one context: scores, softmax and weighted values, tile by tile.

Owns the arithmetic that every kernel of attention shares. Knows no programs and no splits, nor whose queries and
pages these are. Scores and sums are fp32 and in base 2; the weights of the softmax are rounded to the dtype of the
queries before they meet V, as tensor cores take them. With a cache of 8 bits they are multiplied by V's scales first,
and float16 has too little range for the small ones: there they meet V in bfloat16, which holds stored numbers
exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.tanh import tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def walk(
    top, total, mixed, query, position, slope, first, stop, low, high,
    keys, values, key_scales, value_scales, table, scale, cap, window,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Go on with a softmax over the tiles from token `first` (a multiple of TILE) until `stop`. Scores are in base 2:
    `scale` · (q · k), or with a `cap` that · tanh(`scale` · (q · k)), plus `slope` [M] · distance.

    State: top [M] the highest score, total [M] the sum of weights, mixed [M, WIDTH] the weighted values.
    query [M, WIDTH], at position [M]. Some query sees the tokens `low` until `high`; where not MASKED every query
    sees every token of these tiles. SHARED: rows of the block may see different tokens. `keys`, `values` and their
    scales start at the kv head, `table` at the row.
    """
    channel, lane = tl.arange(0, WIDTH), tl.arange(0, TILE)
    HALF: tl.constexpr = value_scales is not None and query.dtype == tl.float16
    MIXED: tl.constexpr = tl.bfloat16 if HALF else query.dtype  # in which weights meet V
    LATER: tl.constexpr = key_scales is None and cap is None and slope is None  # scores are scaled
    for start in range(first, stop, TILE):
        token = start + lane
        useful = (token >= low) & (token < high)
        # K lies as V does, so that they share the registers of their places. What is read of it beyond the useful
        # tokens lies in pages that exist and is hidden as a score. int64: the pool may hold more than 2^31 elements.
        if PAGE % TILE == 0:
            # of the whole tile, of which some token is useful
            block = tl.load(table + start // PAGE).to(tl.int64) * KV_HEADS
            within = tl.multiple_of(start % PAGE, TILE)
            place = block * (DIM * PAGE) + within * DIM + (lane[:, None] * DIM + channel[None, :])
            scale_place = block * PAGE + within + lane
        else:
            if MASKED:
                page = tl.load(table + token // PAGE, mask=useful, other=0).to(tl.int64)
            else:
                page = tl.load(table + token // PAGE).to(tl.int64)
            block, within = page * KV_HEADS, token % PAGE  # [TILE]
            place = block[:, None] * (DIM * PAGE) + within[:, None] * DIM + channel[None, :]
            scale_place = block * PAGE + within

        if DIM == WIDTH:
            k = tl.load(keys + place)
        else:
            k = tl.load(keys + place, mask=channel[None, :] < DIM, other=0.0)
        scores = tl.dot(query, tl.trans(k).to(query.dtype), input_precision="ieee")  # [M, TILE]
        if not LATER:
            scores *= scale
        if key_scales is not None:
            k_scale = tl.load(key_scales + scale_place, mask=useful, other=0.0).to(tl.float32)
            scores *= k_scale[None, :]
        if cap is not None:
            scores = cap * tanh(scores)
        if slope is not None:
            scores += slope[:, None] * (token[None, :] - position[:, None]).to(tl.float32)
        if MASKED:
            seen = useful[None, :]
            if SHARED:
                seen &= token[None, :] <= position[:, None]
                if window is not None:
                    seen &= token[None, :] > position[:, None] - window
            scores = tl.where(seen, scores, float("-inf"))

        highest = tl.max(scores, axis=1)
        if LATER:
            highest *= scale
        higher = tl.maximum(top, highest)
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a query may see nothing of these tiles
        if LATER:  # one operation instead of two
            weights = tl.exp2(tl.fma(scores, scale, -safe[:, None]))
        else:
            weights = tl.exp2(scores - safe[:, None])
        kept = tl.exp2(top - safe)

        if MASKED:
            v = tl.load(values + place, mask=useful[:, None] & (channel[None, :] < DIM), other=0.0)
        elif DIM == WIDTH:
            v = tl.load(values + place)
        else:
            v = tl.load(values + place, mask=channel[None, :] < DIM, other=0.0)
        v = v.to(MIXED)
        if value_scales is not None:
            v_scale = tl.load(value_scales + scale_place, mask=useful, other=0.0).to(tl.float32)
        total = total * kept + tl.sum(weights, axis=1)
        if value_scales is not None:
            weights *= v_scale[None, :]
        mixed = tl.dot(weights.to(MIXED), v, mixed * kept[:, None], input_precision="ieee")
        top = higher
    return top, total, mixed


@triton.jit
def slope_of(slopes, head, valid):
    """[M] of the heads [M], for scores in base 2."""
    return tl.load(slopes + head, mask=valid, other=0.0) * LOG2_E


@triton.jit
def with_sink(top, total, sinks, head, valid):
    """What weights are divided by, [M], once all that a query sees is in `top` and `total`: the heads' [M] sinks join
    the sum, by the same operations in whatever kernel ends a softmax, so that all leave the same bits. A sink so far
    above all scores that this overflows leaves nothing of them, as it should."""
    return total + tl.exp2(tl.fma(tl.load(sinks + head, mask=valid, other=0.0), LOG2_E, -top))
