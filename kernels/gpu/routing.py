"""Routing: which experts a token goes to and with what share, where each expert's tokens lie side by side, and the
sum of what came back.

Owns these three launches, which read nothing back to the host. Knows no products (`grouped_matmul`). An entry is a
token's choice of one expert: entry token · K + j is the j-th of its K, the largest share first. A place is where an
entry lies when all are sorted by expert, and within an expert in their own order: that takes no atomics, and gives
the same places every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program of `combine_kernel`
LEAST_ENTRIES, MOST_ENTRIES = 1024, 4096  # that are looked at together


@triton.jit
def route_kernel(
    logits, chosen, shares, stride, experts,
    K: tl.constexpr, NORMALISED: tl.constexpr, EXPERTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """chosen [T, K] int32 and shares [T, K] fp32 of logits [T, experts]; a token per program. EXPERTS and LANES:
    `experts` and K, rounded up to powers of two."""
    token = tl.program_id(0).to(tl.int64)
    expert, lane = tl.arange(0, EXPERTS), tl.arange(0, LANES)
    inside = expert < experts
    x = tl.load(logits + token * stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    weights = tl.exp(x - tl.max(x, axis=0))
    share = weights / tl.sum(weights, axis=0)
    # of one that is broken all are NaN, and the first K experts are taken
    broken = tl.max((share != share).to(tl.int32), axis=0) > 0
    left = tl.where(inside, tl.where(broken, 1.0, share), -1.0)
    total = tl.full((), 0.0, tl.float32)
    first, largest = tl.zeros((LANES,), dtype=tl.int32), tl.zeros((LANES,), dtype=tl.float32)
    for j in tl.static_range(K):
        most = tl.max(left, axis=0)
        who = tl.min(tl.where(left == most, expert, EXPERTS), axis=0)
        left = tl.where(expert == who, -1.0, left)
        total += most
        first, largest = tl.where(lane == j, who, first), tl.where(lane == j, most, largest)
    if NORMALISED:
        largest /= total
    tl.store(chosen + token * K + lane, first, mask=lane < K)
    tl.store(shares + token * K + lane, tl.where(broken, float("nan"), largest), mask=lane < K)


@triton.jit(do_not_specialize=["entries"])
def group_kernel(chosen, starts, places, sources, entries, K: tl.constexpr, BLOCK: tl.constexpr):
    """Of one expert per program where its entries begin, starts [E + 1] int32, the places of its entries, places
    [entries] int32, and the token at each of its places, sources [entries] int32."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in range(0, entries, BLOCK):
        other = tl.load(chosen + block + lane, mask=block + lane < entries, other=0x7FFFFFFF)
        before += (other < expert).to(tl.int32)
    place = tl.sum(before, axis=0)
    tl.store(starts + expert, place)
    for block in range(0, entries, BLOCK):
        entry = block + lane
        own = tl.load(chosen + entry, mask=entry < entries, other=-1) == expert
        at = place + tl.cumsum(own.to(tl.int32), axis=0) - 1
        tl.store(places + entry, at, mask=own)
        tl.store(sources + at, entry // K, mask=own)
        place += tl.sum(own.to(tl.int32), axis=0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, entries)


@triton.jit
def combine_kernel(made, places, shares, out, hidden, K: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, hidden] = Σ shares [T, K] · made at places [T, K], in their order; made [entries, hidden]."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(K):
        place = tl.load(places + token * K + j).to(tl.int64)
        value = tl.load(made + place * hidden + column, mask=inside, other=0.0).to(tl.float32)
        total += value * tl.load(shares + token * K + j)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)


def route(logits: Tensor, num_per_token: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """(the experts of each token, int32, their shares, fp32), each `[T, num_per_token]`."""
    tokens, experts = logits.shape
    chosen = torch.empty((tokens, num_per_token), dtype=torch.int32, device=logits.device)
    shares = torch.empty((tokens, num_per_token), dtype=torch.float32, device=logits.device)
    route_kernel[(tokens,)](
        logits, chosen, shares, logits.stride(0), experts,
        K=num_per_token, NORMALISED=normalised, EXPERTS=triton.next_power_of_2(experts),
        LANES=triton.next_power_of_2(num_per_token), num_warps=1,
    )  # fmt: skip
    return chosen, shares


def grouped(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(starts `[experts + 1]`, places `[T, K]`, tokens `[T · K]` in the order of places), int32."""
    starts = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    places = torch.empty_like(chosen)
    sources = torch.empty(chosen.numel(), dtype=torch.int32, device=chosen.device)
    block = min(MOST_ENTRIES, max(LEAST_ENTRIES, triton.next_power_of_2(chosen.numel())))
    group_kernel[(experts,)](
        chosen, starts, places, sources, chosen.numel(),
        K=chosen.shape[1], BLOCK=block, num_warps=block // 512,
    )  # fmt: skip
    return starts, places, sources


def combine(made: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """`[T, hidden]` of what the experts have made, `[T · K, hidden]`."""
    (tokens, num_per_token), hidden = places.shape, made.shape[1]
    out = torch.empty((tokens, hidden), dtype=made.dtype, device=made.device)
    combine_kernel[(tokens, triton.cdiv(hidden, BLOCK))](
        made, places, shares, out, hidden, K=num_per_token, BLOCK=BLOCK
    )
    return out
