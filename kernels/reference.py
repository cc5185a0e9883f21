"""The truth: every operation of the contract in plain torch, on any device and dtype.

Owns readability; speed is for the other sets, which are tested against this one. Knows no C and no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    FAILED,
    Activation,
    Attention,
    DecodingRows,
    Filters,
    GatedActivation,
    Kernels,
    Normalisers,
    PagedKV,
    Penalties,
    Rotations,
    SharedPrefixes,
)
from kernels.attending import LIMITS
from kernels.noise import uniforms
from kernels.running_sums import running_sums
from kernels.weights import BLOCK, Float8Weight, Int4Weight, Int8Weight, rounded_to_int8

Attend = Callable[[Tensor, PagedKV, Tensor, Tensor, Tensor, Attention], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    wide = x.float()
    # x·rsqrt(mean) row by row: the mean runs over the last dimension only
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (scaled * (weight.float() + offset)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps, offset), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    return (scaled if bias is None else scaled + bias.float()).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = (x.float() + residual.float()).to(x.dtype)
    return layer_norm(total, weight, bias, eps), total


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    for x in (q, k):
        first, second = x.float().chunk(2, dim=-1)  # [T, h, d/2] each
        c, s = cos[:, None, :], sin[:, None, :]
        x.copy_(torch.cat((first * c - second * s, second * c + first * s), dim=-1))


def store_kv(k: Tensor, v: Tensor, cache: PagedKV, slots: Tensor) -> None:
    page_size = cache.keys.shape[3]
    kept = slots >= 0
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    k, v = k[kept], v[kept]  # [n, hk, d]
    failed = ~v.isfinite().all(dim=-1, keepdim=True)
    k, v = k.masked_fill(failed, float("nan")), v.masked_fill(failed, 0.0)
    if cache.key_scales is not None and cache.value_scales is not None:
        k, cache.key_scales[page, :, offset] = quantise(k, cache.keys.dtype)
        v, cache.value_scales[page, :, offset] = quantise(v, cache.values.dtype)
    _indexable(cache.keys)[page, :, :, offset] = _indexable(k)  # K transposed
    _indexable(cache.values)[page, :, offset] = _indexable(v)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[..., d]` as 8 bits `[..., d]` and bfloat16 scales `[...]`, by the rule of the contract."""
    wide = x.float()
    largest = wide.abs().amax(dim=-1)  # NaN where any is NaN
    # the upper 16 bits of an fp32 are a bfloat16: round up, also from what the division has lost to 0
    bits = ((largest / torch.full_like(largest, LIMITS[dtype])).view(torch.int32) + 0xFFFF) >> 16
    bits = bits.clamp_min(1).masked_fill(largest == 0, 0)
    scales = bits.to(torch.int16).view(torch.bfloat16)
    scales = scales.masked_fill(~largest.isfinite(), float("nan"))
    ratio = wide / scales.float().unsqueeze(-1)
    ratio = ratio.masked_fill(~(scales > 0).unsqueeze(-1), 0.0)  # neither 0 / 0 nor NaN has an 8-bit value
    return (ratio.round() if dtype == torch.int8 else ratio).to(dtype), scales


def _indexable(x: Tensor) -> Tensor:
    """torch indexes bytes on every device, fp8 not on all."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def act(x: Tensor, activation: Activation) -> Tensor:
    return _ACTIVATIONS[activation](x.float()).to(x.dtype)


def act_mul(gate_up: Tensor, activation: GatedActivation) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (gate * torch.sigmoid(1.702 * gate) * (up + 1.0)).to(gate_up.dtype)
    return (_ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)


def softcap(x: Tensor, cap: float) -> Tensor:
    return (cap * torch.tanh(x.float() / cap)).to(x.dtype)


def paged_attention(
    q: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_start: Tensor | None,
    context_lens: Tensor,
    how: Attention,
    shared: SharedPrefixes | None = None,
) -> Tensor:
    if query_start is None:
        return attend_with_single_queries(paged_attention, q, cache, page_table, context_lens, how)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    _, num_heads, head_dim = q.shape
    num_kv_heads = cache.keys.shape[1]
    group = num_heads // num_kv_heads
    slopes, sinks = (
        None if each is None else each.reshape(num_kv_heads, group, 1) for each in (how.slopes, how.sinks)
    )
    starts, lens = query_start.tolist(), context_lens.tolist()
    for row, length in enumerate(lens):
        start, end = starts[row], starts[row + 1]
        if start == end:
            continue
        window = length if how.window is None else how.window
        base = max(0, length - (end - start) - window + 1)  # the first token that any of them sees
        keys, values = _context(cache, page_table[row], base, length)
        for token in range(start, end):
            # Each by itself, in memory of its own: how the library sums depends on how many tokens there are
            seen = length - (end - token) + 1
            first = max(0, seen - window)
            k, v = (x[:, first - base : seen - base].contiguous() for x in (keys, values))
            query = q[token].to(torch.float32, copy=True).reshape(num_kv_heads, group, head_dim)
            scores = torch.einsum("hgd,hld->hgl", query, k) * how.scale  # [hk, group, seen - first]
            if how.softcap is not None:
                scores = softcap(scores, how.softcap)
            if slopes is not None:
                scores += slopes * torch.arange(first + 1 - seen, 1, device=q.device)
            if sinks is not None:
                scores = torch.cat((scores, sinks), dim=-1)
            weights = torch.softmax(scores, dim=-1)[:, :, : seen - first]
            mixed = torch.einsum("hgl,hld->hgd", weights, v)
            out[token] = mixed.reshape(num_heads, head_dim).to(q.dtype)
    return out


def attend_with_single_queries(
    attend: Attend, q: Tensor, cache: PagedKV, page_table: Tensor, context_lens: Tensor, how: Attention
) -> Tensor:
    """`paged_attention` without `query_start`, by an `attend` that must have it: padding sees a token of page 0, and
    what it has seen is forgotten."""
    starts = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    padding = context_lens == 0
    if not padding.any():
        return attend(q, cache, page_table, starts, context_lens, how)
    page_table = page_table.masked_fill(padding[:, None], 0)
    return attend(q, cache, page_table, starts, context_lens.clamp(min=1), how).masked_fill_(
        padding[:, None, None], 0.0
    )


def _context(cache: PagedKV, page_table: Tensor, base: int, length: int) -> tuple[Tensor, Tensor]:
    """K and V of a row's tokens `base:length` `[hk, length - base, d]` in fp32, cut before any arithmetic: what
    lies outside may be NaN, and its pages none."""
    _, heads, dim, page_size = cache.keys.shape
    skipped = base // page_size
    pages = page_table[skipped : -(-length // page_size)].long()
    cut = slice(base - skipped * page_size, length - skipped * page_size)
    k = _indexable(cache.keys)[pages].permute(1, 0, 3, 2).reshape(heads, -1, dim)[:, cut]
    v = _indexable(cache.values)[pages].transpose(0, 1).reshape(heads, -1, dim)[:, cut]
    k, v = k.view(cache.keys.dtype).float(), v.view(cache.values.dtype).float()
    if cache.key_scales is not None and cache.value_scales is not None:
        k = k * cache.key_scales[pages].transpose(0, 1).reshape(heads, -1, 1)[:, cut].float()
        v = v * cache.value_scales[pages].transpose(0, 1).reshape(heads, -1, 1)[:, cut].float()
    return k, v


def sample(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, filters: Filters | None = None
) -> Tensor:
    largest, likeliest = logits.max(dim=1)  # the lowest index wins a tie; NaN wins everything
    sound = torch.isfinite(largest)
    tokens = torch.where(sound, likeliest, FAILED)
    drawn = (sound & (temperatures > 0)).nonzero()[:, 0]
    if len(drawn):
        temperature, top = temperatures[drawn].double(), largest[drawn].double()
        weights = ((logits[drawn].double() - top[:, None]) / temperature[:, None]).exp_()  # [n, vocab]
        if filters is not None:
            of_drawn = Filters(filters.top_k[drawn], filters.top_p[drawn], filters.min_p[drawn])
            weights.masked_fill_(~kept(logits[drawn], temperature, of_drawn), 0.0)
        sums = running_sums(weights)
        u = torch.from_numpy(uniforms(seeds[drawn].cpu().numpy(), positions[drawn].cpu().numpy()))
        found = torch.searchsorted(sums, u.to(logits.device)[:, None] * sums[:, -1:], right=True)
        found.clamp_(max=logits.shape[1] - 1)
        # a GPU's cumsum is no sum from left to right: it may grow by rounding where a weight is 0
        possible = weights.gather(1, found)[:, 0] > 0
        tokens[drawn] = torch.where(possible, found[:, 0], likeliest[drawn])
    return tokens


def kept(logits: Tensor, temperature: Tensor, filters: Filters) -> Tensor:
    """Of rows that are finite, which tokens they may draw: logits `[n, vocab]`, temperature `[n]` fp64 above 0, to
    `[n, vocab]` bool."""
    wide = logits.double() + 0.0  # no -0.0, which a sort may tell from 0.0
    top = wide.amax(dim=1)
    wide.masked_fill_(wide < (top + temperature * filters.min_p.log())[:, None], float("-inf"))
    ranked, order = wide.sort(dim=1, descending=True, stable=True)
    weights = ((ranked - top[:, None]) / temperature[:, None]).exp_()
    first = filters.top_k[:, None] > torch.arange(logits.shape[1], device=logits.device)
    first |= filters.top_k[:, None] == 0
    sums = running_sums(weights.masked_fill_(~first, 0.0))
    nucleus = sums - weights < filters.top_p[:, None] * sums[:, -1:]
    nucleus |= filters.top_p[:, None] == 1.0
    nucleus[:, 0] = True
    stays = first & nucleus & (ranked > float("-inf"))
    return torch.zeros_like(stays).scatter_(1, order, stays)


def normalisers(logits: Tensor) -> Normalisers:
    # torch reduces each row by itself, in an order given by its length; on CUDA by its alignment too, which the
    # padding makes the same for all rows. `logsumexp` would split single long rows over threads.
    wide, vocab = logits.float(), logits.shape[1]
    if vocab % 4:  # floats in 16 bytes
        wide = F.pad(wide, (0, -vocab % 4), value=float("-inf"))
    largest, at = wide.max(dim=1, keepdim=True)
    return Normalisers(largest[:, 0], -torch.log_softmax(wide, dim=1).gather(1, at)[:, 0])


def penalise(logits: Tensor, penalties: Penalties) -> None:
    rows, at = _listed(penalties).nonzero(as_tuple=True)  # [n], entries of all rows
    ids, times = penalties.token_ids[rows, at].long(), penalties.times[rows, at].float()
    x, repetition = logits[rows, ids], penalties.repetition[rows]
    x = torch.where(x > 0, x / repetition, x * repetition)
    x -= penalties.frequency[rows] * times
    x -= penalties.presence[rows] * (times > 0)
    logits[rows, ids] = x


def count_tokens(penalties: Penalties, tokens: Tensor) -> None:
    token_ids, times, lengths = penalties.token_ids, penalties.times, penalties.lengths
    same = _listed(penalties) & (token_ids == tokens[:, None])
    known = same.any(dim=1)
    place = torch.where(known, same.int().argmax(dim=1), lengths)
    noted = (lengths > 0) & (tokens >= 0) & (place < token_ids.shape[1])
    rows = noted.nonzero()[:, 0]
    at, known = place[rows], known[rows]
    token_ids[rows, at] = tokens[rows].int()
    times[rows, at] = torch.where(known, times[rows, at], 0) + 1
    lengths[rows] += (~known).int()


def _listed(penalties: Penalties) -> Tensor:
    """[S, N] bool: the entries that count."""
    places = torch.arange(penalties.token_ids.shape[1], device=penalties.lengths.device)
    return places < penalties.lengths[:, None]


def look_up(
    token_ids: Tensor, positions: Tensor, embedding: Tensor, tables: Rotations
) -> tuple[Tensor, Rotations]:
    return embedding[token_ids], tuple((cos[positions], sin[positions]) for cos, sin in tables)


def advance(
    rows: DecodingRows, drawn: Tensor | None, logits: Tensor | None = None, of: Normalisers | None = None
) -> None:
    lengths, limits, size = rows.lengths, rows.limits, rows.page_size
    if drawn is None:
        rows.counts.zero_()
    else:
        torch.clamp(drawn, min=0, out=rows.token_ids)
        rows.made.scatter_(0, rows.counts[None], drawn[None])
        if logits is not None and of is not None:
            largest, log_sums = of
            found = logits.gather(1, rows.token_ids[:, None])[:, 0].float()
            rows.logprobs.scatter_(0, rows.counts[None], ((found - largest) - log_sums)[None])
        lengths += 1
        rows.counts.add_(1)
    at = (torch.minimum(lengths, limits) - 1).clamp_(min=0)  # where a row stands that does not go on
    goes_on = (lengths > 0) & (lengths <= limits)
    page = rows.page_table.gather(1, (at // size)[:, None])[:, 0].long()
    rows.positions.copy_(at)
    rows.slots.copy_(torch.where(goes_on, page * size + at % size, -1))
    rows.context_lens.copy_(torch.where(goes_on, lengths, 0))


def int4_matmul(x: Tensor, weight: Int4Weight, bias: Tensor | None, *, invariant: bool = False) -> Tensor:
    return _multiplied(x.float(), weight.dequantised(), bias, x.dtype)


def fp8_matmul(x: Tensor, weight: Float8Weight, bias: Tensor | None, *, invariant: bool = False) -> Tensor:
    width = BLOCK if weight.blocks else max(1, x.shape[1])
    pieces = [_through_fp8(piece) for piece in torch.split(x.float(), width, dim=1)]
    return _multiplied(torch.cat(pieces, dim=1), weight.dequantised(), bias, x.dtype)


def _through_fp8(x: Tensor) -> Tensor:
    """What fp32 rows `[T, n]` mean after they were rounded to fp8 with one scale each."""
    limit = LIMITS[torch.float8_e4m3fn]
    scales = x.abs().amax(dim=1, keepdim=True) / limit
    scales = scales.masked_fill(~scales.isfinite(), float("nan"))
    reach = torch.where(scales > 0, 1.0 / scales, 0.0)
    return (x * reach).nan_to_num(0.0).clamp(-limit, limit).to(torch.float8_e4m3fn).float() * scales


def quantise_int8(weight: Tensor) -> Int8Weight:
    outputs, inputs = weight.shape
    integers, scales = rounded_to_int8(weight)
    return Int8Weight((outputs, inputs), integers.flatten(), scales)


def int8_matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    integers, scales = rounded_to_int8(x)
    sums = integers.double() @ weight.words.view(weight.shape).double().T  # exact: below 2^53
    made = sums.float() * (weight.scales * scales[:, None])
    made.masked_fill_(~x.isfinite().all(dim=1, keepdim=True), float("nan"))
    return (made if bias is None else made + bias.float()).to(x.dtype)


def _multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """In fp32, row by row: how the library sums may depend on the number of rows."""
    products = [row @ weight.t() for row in x.unbind()]
    if not products:
        return torch.empty((0, weight.shape[0]), dtype=dtype, device=x.device)
    made = torch.stack(products)
    return (made if bias is None else made + bias.float()).to(dtype)


KERNELS = Kernels(
    name="reference",
    quantised=tuple(LIMITS),
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rope=rope,
    store_kv=store_kv,
    layer_norm=layer_norm,
    add_layer_norm=add_layer_norm,
    act=act,
    act_mul=act_mul,
    softcap=softcap,
    paged_attention=paged_attention,
    sample=sample,
    normalisers=normalisers,
    penalise=penalise,
    count_tokens=count_tokens,
    look_up=look_up,
    advance=advance,
    int4_matmul=int4_matmul,
    fp8_matmul=fp8_matmul,
    quantise_int8=quantise_int8,
    int8_matmul=int8_matmul,
)
