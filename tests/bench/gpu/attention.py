"""Attention: the kernel set's attention over pages beside torch's, on the same numbers.

Owns the cases and the comparison. torch's SDPA has no pages: it gets K and V gathered and contiguous, of a cache of 8
bits in bfloat16, and the gather is not timed. FlexAttention gets the same. Each call is timed alone (`timing`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import Attention, PagedKV, kernels_for
from kernels.reference import quantise
from tests.bench.gpu import rivals
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.timing import seconds_of

PAGES = (64, 16)  # the engine's default on a GPU, and the smallest there is
NOTE = "SDPA and FlexAttention have no pages: K and V are gathered for them in bfloat16, which is not timed"


class Case(NamedTuple):
    """`rows` sequences with the last `queries` of `context` tokens each. `context` is whole pages of the smallest."""

    name: str
    rows: int
    queries: int
    context: int
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    storage: torch.dtype | None = None  # of a cache of 8 bits

    @property
    def kv_bytes(self) -> int:
        """Of K and V that some query sees, each read once; with scales, where there are any."""
        seen = self.context if self.window is None else min(self.context, self.queries + self.window - 1)
        head = 2 * self.dim if self.storage is None else self.dim + 2
        return 2 * self.rows * seen * self.kv_heads * head

    @property
    def flops(self) -> int:
        seen = (position + 1 for position in range(self.context - self.queries, self.context))
        pairs = sum(tokens if self.window is None else min(tokens, self.window) for tokens in seen)
        return 4 * self.heads * self.dim * self.rows * pairs


CASES = (
    Case("decode 256 x 1k, 16/8/128", 256, 1, 1024, 16, 8, 128),
    Case("decode 256 x 1k, 32/8/128", 256, 1, 1024, 32, 8, 128),
    Case("decode 256 x 1k, 9/3/64", 256, 1, 1024, 9, 3, 64),
    Case("decode 8 x 32k, 32/8/128", 8, 1, 32768, 32, 8, 128),
    Case("prefill 16 x 1k, 16/8/128", 16, 1024, 1024, 16, 8, 128),
    Case("prefill 16 x 1k, 32/8/128", 16, 1024, 1024, 32, 8, 128),
    Case("chunk 512 of 8k, 32/8/128", 1, 512, 8192, 32, 8, 128),
    Case("prefill 16 x 1k, 18/6/64", 16, 1024, 1024, 18, 6, 64),
    Case("prefill 16 x 1k, 8/4/256", 16, 1024, 1024, 8, 4, 256),
    Case("prefill 4 x 4k, 32/8/128, window 1k", 4, 4096, 4096, 32, 8, 128, window=1024),
    Case("prefill 16 x 1k, 32/8/128, int8", 16, 1024, 1024, 32, 8, 128, storage=torch.int8),
    Case("decode 256 x 1k, 32/8/128, int8", 256, 1, 1024, 32, 8, 128, storage=torch.int8),
    Case("decode 256 x 1k, 32/8/128, fp8", 256, 1, 1024, 32, 8, 128, storage=torch.float8_e4m3fn),
)
TINY = (
    Case("decode 4 x 64, 4/2/16", 4, 1, 64, 4, 2, 16),
    Case("prefill 2 x 32, 4/2/16", 2, 32, 32, 4, 2, 16),
    Case("chunk 16 of 64, 4/2/16", 1, 16, 64, 4, 2, 16),
    Case("chunk 16 of 64, 4/2/16, window 24", 1, 16, 64, 4, 2, 16, window=24),
    Case("decode 4 x 64, 4/2/16, int8", 4, 1, 64, 4, 2, 16, storage=torch.int8),
)


class Inputs(NamedTuple):
    q: Tensor  # [rows · queries, heads, dim]
    cache: PagedKV
    page_table: Tensor  # [rows, pages of a row] int32
    query_start: Tensor  # [rows + 1] int32
    context_lens: Tensor  # [rows] int32
    keys: Tensor  # [rows, kv_heads, context, dim] bfloat16, what the cache means
    values: Tensor

    @property
    def queries(self) -> Tensor:
        """`[rows, heads, queries, dim]`, contiguous."""
        rows = self.page_table.shape[0]
        return self.q.unflatten(0, (rows, -1)).transpose(1, 2).contiguous()


def attention(setting: Setting) -> Iterator[dict[str, Any]]:
    """For each case: microseconds of ours, with pages of each size, of SDPA and of FlexAttention, ours with the
    largest pages against the ceilings, and the largest differences between that and theirs. FlexAttention, which
    compiles for each case, comes after all others."""
    end = time.perf_counter() + setting.seconds
    found: dict[str, Any] = {"note": NOTE, "cases": []}
    cases = TINY if setting.tiny else CASES
    for case in cases:
        if time.perf_counter() > end:
            found["cut"] = True
            break
        *others, page = [size for size in reversed(PAGES) if case.context % size == 0]
        inputs, ours = _prepared(case, setting, page)
        result = _bounded(case, seconds_of(ours, setting.device), setting) | {"page": page}
        for size in others:
            _, with_pages = _prepared(case, setting, size)
            result[f"us_with_pages_of_{size}"] = _us(seconds_of(with_pages, setting.device))
            del with_pages
        found["cases"].append(
            result | _compared("sdpa", rivals.sdpa(case, inputs, setting.device), case, ours())
        )
        del inputs, ours
        yield found
    for case, result in zip(cases, found["cases"], strict=False):
        if time.perf_counter() > end:
            result["flex_why"] = "no time was left"
            continue
        inputs, ours = _prepared(case, setting, result["page"])
        result |= _compared("flex", rivals.flex(case, inputs, setting.device), case, ours())
        del inputs, ours
        print(result, flush=True)
        yield found
    yield found


def _prepared(case: Case, setting: Setting, page: int) -> tuple[Inputs, Callable[[], Tensor]]:
    kernels = kernels_for(setting.device, setting.kernels)
    with torch.inference_mode():
        inputs = make_inputs(case, setting.device, page, keys_by_token=kernels.keys_by_token)
    q, cache, table, starts, lens, *_ = inputs
    how = Attention(case.dim**-0.5, window=case.window)
    return inputs, lambda: kernels.paged_attention(q, cache, table, starts, lens, how)


def _bounded(case: Case, seconds: float, setting: Setting) -> dict[str, Any]:
    copy_rate, product_rate = setting.rates
    return {
        "case": case.name,
        "us": _us(seconds),
        "gb_s": round(case.kv_bytes / seconds / 1e9, 1),  # of K and V, read once
        "copy_share": round(case.kv_bytes / seconds / copy_rate, 4),
        "tflop_s": round(case.flops / seconds / 1e12, 3),
        "product_share": round(case.flops / seconds / product_rate, 4),
        "sdpa_us": None,
        "flex_us": None,
    }


def _compared(name: str, rival: dict[str, Any], case: Case, made: Tensor) -> dict[str, Any]:
    """`made`: our result `[rows · queries, heads, dim]`."""
    result = {f"{name}_{key}": rival[key] for key in ("how", "why") if rival.get(key)}
    if "out" in rival:
        ours = made.unflatten(0, (case.rows, -1)).transpose(1, 2)
        result[f"{name}_us"] = _us(rival["seconds"])
        result[f"{name}_error"] = float((ours.float() - rival["out"].float()).abs().max())
    return result


def make_inputs(case: Case, device: str, page: int, *, keys_by_token: bool = False) -> Inputs:
    """Random numbers; the pages of all rows, of `page` tokens each, lie in a random order."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    per_row = case.context // page
    num_pages = case.rows * per_row
    shape = (num_pages, case.kv_heads, page, case.dim)
    (k, k_scales, plain_k), (v, v_scales, plain_v) = (_stored(normal(*shape), case.storage) for _ in range(2))
    by_token = k.transpose(2, 3)
    cache = PagedKV(by_token if keys_by_token else by_token.contiguous(), v, k_scales, v_scales)
    order = torch.randperm(num_pages, generator=generator, device=device)
    table = order.view(case.rows, per_row)
    starts = torch.arange(case.rows + 1, device=device, dtype=torch.int32) * case.queries
    keys, values = (x[table].transpose(1, 2).flatten(2, 3) for x in (plain_k, plain_v))
    return Inputs(
        q=normal(case.rows * case.queries, case.heads, case.dim),
        cache=cache,
        page_table=table.int().contiguous(),
        query_start=starts,
        context_lens=torch.full((case.rows,), case.context, device=device, dtype=torch.int32),
        keys=keys.contiguous(),
        values=values.contiguous(),
    )


def _stored(x: Tensor, storage: torch.dtype | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the cache holds of x [pages, kv_heads, page, dim], its scales, and what both mean, in the dtype of x."""
    if storage is None:
        return x, None, x
    stored, scales = quantise(x, storage)
    return stored, scales, (stored.float() * scales.float().unsqueeze(-1)).to(x.dtype)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)
