"""Filters: min-p, top-k and top-p of a row of logits, and the draw from what they leave; one launch, in which nothing
is sorted and nothing is read back to the host.

A row's logits are ordered by integer keys. The filters keep all tokens above a least key, and the first few of those
that have it. That key is searched for: a token stays if the tokens above it measure less than a bound, counted for
top-k, weighed for top-p. Each pass of the search halves the range of keys and moves both its ends to keys that the
row has. Weights are whole numbers, so no order of summation changes a sum, and no row depends on another.

Passes over a whole vocabulary would be slow. So three bounds come first, below which nothing can stay: min-p's own;
for top-p, a weight so small that a whole vocabulary of such tokens weighs less than 1 - p; for top-k, the k-th
largest of the maxima of groups of tokens. The tokens that reach these bounds are collected in the order of ids, and
searched alone if they are few enough.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import Filters
from kernels.gpu.noise import uniform
from kernels.gpu.token_weights import COLDEST, STEPS, weights

GROUP = 256  # tokens of which the largest logit is known
MOST = 8192  # tokens that are collected
LONG_TILE, TILE, SMALL_TILE = 4096, 2048, 1024  # of a row that is read once, of the search, and of groups
WARPS = 16
LOWEST = tl.constexpr(-(2**31))  # below the keys of all numbers
HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _keys(values):
    """fp32 to int32 of the same order; zeros are equal."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _least_key(bound):
    """Of the numbers in fp32 that are not below `bound`, fp64; to int64."""
    rounded = bound.to(tl.float32)
    return _keys(rounded).to(tl.int64) + (rounded.to(tl.float64) < bound).to(tl.int64)


@triton.jit
def _tile(row, values, few, start, count, TILE: tl.constexpr):
    """Logits [TILE] fp32 and their keys, from `start` on, of the row, or of its `values` that were collected if those
    are `few`; behind `count` keys are the lowest and logits -inf."""
    place = start + tl.arange(0, TILE)
    found = tl.load(row + place, mask=(place < count) & (few == 0), other=float("-inf")).to(tl.float32)
    collected = tl.load(values + place, mask=(place < count) & (few != 0), other=float("-inf"))
    found = tl.maximum(found, collected)  # one of them is -inf
    return found, tl.where(place < count, _keys(found), LOWEST)


@triton.jit
def _above(row, values, few, count, pivot, top, temperature, WEIGH: tl.constexpr, TILE: tl.constexpr):
    """What keys above the pivot measure, int64; the lowest of them; and the highest of the others."""
    amounts = tl.zeros((TILE,), tl.int64)
    higher, lower = tl.full((TILE,), HIGHEST, tl.int32), tl.full((TILE,), LOWEST, tl.int32)
    for start in range(0, count, TILE):
        found, keys = _tile(row, values, few, start, count, TILE)
        above = keys > pivot
        if WEIGH:
            amounts += tl.where(above, weights(found, top, temperature), 0)
        else:
            amounts += above.to(tl.int64)
        higher = tl.minimum(higher, tl.where(above, keys, HIGHEST))
        lower = tl.maximum(lower, tl.where(above, LOWEST, keys))
    return tl.sum(amounts, axis=0), tl.min(higher, axis=0).to(tl.int64), tl.max(lower, axis=0).to(tl.int64)


@triton.jit
def _least(row, values, few, count, low, bound, top, temperature, WEIGH: tl.constexpr, TILE: tl.constexpr):
    """The least key above `low` above which keys measure less than `bound`, which is at least 1. int64."""
    high = _keys(top).to(tl.int64)
    while high - low > 1:
        pivot = low + ((high - low) >> 1)
        amount, higher, lower = _above(row, values, few, count, pivot, top, temperature, WEIGH, TILE)
        stays, none = amount < bound, lower <= low
        high = tl.where(stays, tl.where(none, higher, lower), high)
        low = tl.where(stays & (lower > low), low, higher - 1)
    return high


@triton.jit
def _around(row, values, few, count, key, top, temperature, TILE: tl.constexpr):
    """Of keys above `key`: how many, int32, and their weight, int64; and how many are equal to it, int32."""
    number, equal = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32)
    weight = tl.zeros((TILE,), tl.int64)
    for start in range(0, count, TILE):
        found, keys = _tile(row, values, few, start, count, TILE)
        number += (keys > key).to(tl.int32)
        equal += (keys == key).to(tl.int32)
        weight += tl.where(keys > key, weights(found, top, temperature), 0)
    return tl.sum(number, axis=0), tl.sum(weight, axis=0), tl.sum(equal, axis=0)


@triton.jit
def _weight_of(key, top, temperature):
    """Of a token with this key, int64."""
    bits = key.to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return weights(bits.to(tl.float32, bitcast=True), top, temperature)


@triton.jit
def _draw(
    row, values, ids, few, count, vocab, least, mass, top_k, top_p, u, top, temperature, TILE: tl.constexpr
):  # fmt: skip
    """A token, int64. `count` logits, in the order of ids; keys below `least` have been filtered, and `mass` is
    the weight of the rest. `ids`: of what was collected."""
    equal = tl.full((), HIGHEST, tl.int32)  # how many of the least key stay
    if top_k > 0:
        least = _least(row, values, few, count, least - 1, top_k, top, temperature, False, TILE)
        number, weight, equal = _around(row, values, few, count, least, top, temperature, TILE)
        equal = tl.minimum(equal, top_k - number)
        mass = weight + equal * _weight_of(least, top, temperature)
    if top_p < 1.0:
        bound = tl.maximum(tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64), 1)
        nucleus = _least(row, values, few, count, least - 1, bound, top, temperature, True, TILE)
        number, weight, ties = _around(row, values, few, count, nucleus, top, temperature, TILE)
        one = tl.maximum(_weight_of(nucleus, top, temperature), 1)
        ties = tl.minimum(ties, (bound - weight + one - 1) // one).to(tl.int32)
        equal = tl.where(nucleus == least, tl.minimum(equal, ties), ties)
        least = nucleus
        mass = weight + equal * one
    step = tl.minimum((u * mass.to(tl.float64)).to(tl.int64), mass - 1)

    token, last = tl.zeros((), tl.int32) + vocab, tl.zeros((), tl.int32)
    seen, before = tl.zeros((), tl.int32), tl.zeros((), tl.int64)
    for start in range(0, count, TILE):
        found, keys = _tile(row, values, few, start, count, TILE)
        place = start + tl.arange(0, TILE)
        place = tl.where(few != 0, tl.load(ids + place, mask=(place < count) & (few != 0), other=0), place)
        ties = (keys == least).to(tl.int32)
        stays = (keys > least) | ((ties > 0) & (seen + tl.cumsum(ties, axis=0) <= equal))
        held = tl.where(stays, weights(found, top, temperature), 0)
        sums = before + tl.cumsum(held, axis=0)
        token = tl.minimum(token, tl.min(tl.where((sums > step) & (held > 0), place, vocab), axis=0))
        last = tl.maximum(last, tl.max(tl.where(held > 0, place, 0), axis=0))
        seen += tl.sum(ties, axis=0)
        before += tl.sum(held, axis=0)
    return tl.minimum(token, last).to(tl.int64)  # `last`, should rounding leave none above


@triton.jit
def filter_kernel(
    logits, temperatures, seeds, positions, top_ks, top_ps, min_ps, maxima, sums, group_maxima, values, ids, tokens,
    stride, vocab, blocks, groups,
    BLOCKS: tl.constexpr, MOST: tl.constexpr,
    LONG_TILE: tl.constexpr, TILE: tl.constexpr, SMALL_TILE: tl.constexpr,
):  # fmt: skip
    """tokens [S] int64, drawn anew where the row is filtered and has not failed. maxima, sums: see `sampling`;
    group_maxima [S, groups] fp32; BLOCKS: `blocks`, rounded up to a power of two. Room for what is collected: values
    [S, MOST] fp32 and ids [S, MOST] int32."""
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row).to(tl.float64)
    min_p, heat = tl.load(min_ps + row).to(tl.float64), tl.load(temperatures + row).to(tl.float64)
    temperature = heat.to(tl.float32)
    top_k = tl.where(top_k < vocab, top_k, 0).to(tl.int32)
    asked = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if asked & (temperature != 0.0) & (tl.load(tokens + row) >= 0):
        block = tl.arange(0, BLOCKS)
        largest = tl.load(maxima + row * blocks + block, mask=block < blocks, other=float("-inf"))
        top = tl.max(largest, axis=0)
        # what can stay: a hundredth more than the weight that top-p needs, whatever rounding does
        likely = _least_key(top + heat * tl.log(min_p))
        floor = likely
        if top_p < 1.0:
            scales = tl.exp((largest - top) / tl.maximum(temperature, COLDEST)).to(tl.float64)
            held = tl.load(sums + row * blocks + block, mask=block < blocks, other=0).to(tl.float64)
            whole = tl.where(likely > _keys(float("-inf")), 1.0, tl.sum(held * scales, axis=0) / STEPS)
            whole = tl.where(top_k > 0, 1.0, whole)
            floor = tl.maximum(floor, _least_key(top + heat * tl.log(0.99 * (1.0 - top_p) * whole / vocab)))
        if (top_k > 0) & (top_k <= groups):
            low = tl.full((), LOWEST, tl.int64)
            largest_of = group_maxima + row * groups
            most = _least(largest_of, largest_of, 0, groups, low, top_k, top, temperature, False, SMALL_TILE)
            floor = tl.maximum(floor, most)

        count, masses = tl.zeros((), tl.int32), tl.zeros((LONG_TILE,), tl.int64)
        for start in range(0, vocab, LONG_TILE):
            found, keys = _tile(logits + row * stride, values, 0, start, vocab, LONG_TILE)
            taken = keys >= floor
            place = count + tl.cumsum(taken.to(tl.int32), axis=0) - 1
            room = taken & (place < MOST)
            tl.store(values + row * MOST + place, found, mask=room)
            tl.store(ids + row * MOST + place, start + tl.arange(0, LONG_TILE), mask=room)
            masses += tl.where(keys >= likely, weights(found, top, temperature), 0)
            count += tl.sum(taken.to(tl.int32), axis=0)
        mass = tl.sum(masses, axis=0)
        u = uniform(tl.load(seeds + row), tl.load(positions + row))
        tl.debug_barrier()  # what was collected is there
        few = (count <= MOST).to(tl.int32)
        count = tl.where(few != 0, count, vocab)
        token = _draw(
            logits + row * stride, values + row * MOST, ids + row * MOST, few, count, vocab,
            floor, mass, top_k, top_p, u, top, temperature, TILE,
        )  # fmt: skip
        tl.store(tokens + row, token)


def draw_filtered(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, filters: Filters,
    maxima: Tensor, sums: Tensor, group_maxima: Tensor, tokens: Tensor,
) -> None:  # fmt: skip
    """Overwrites the tokens [S] of filtered rows. maxima, sums [S, blocks] and group_maxima [S, blocks · n]."""
    rows, blocks = maxima.shape
    values = torch.empty((rows, MOST), dtype=torch.float32, device=logits.device)
    ids = torch.empty((rows, MOST), dtype=torch.int32, device=logits.device)
    filter_kernel[(rows,)](
        logits, temperatures, seeds, positions, filters.top_k, filters.top_p, filters.min_p,
        maxima, sums, group_maxima, values, ids, tokens,
        logits.stride(0), logits.shape[1], blocks, group_maxima.shape[1],
        BLOCKS=triton.next_power_of_2(blocks), MOST=MOST,
        LONG_TILE=LONG_TILE, TILE=TILE, SMALL_TILE=SMALL_TILE, num_warps=WARPS,
    )  # fmt: skip
