"""Every kernel set keeps the contract written in `kernels`: one suite over sets, dtypes and odd shapes.

The yardstick is the reference set in fp32 on the same (rounded) inputs, and for the reference set itself a
plain loop in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import Kernels, kernels_for
from kernels.reference import KERNELS as REFERENCE

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (1.2e-2, 1e-2)}  # relative, absolute


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = kernels_for("cpu", request.param)
    assert found.name == request.param, "no working C compiler on this machine"
    return found


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    relative, absolute = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=relative, atol=absolute)


@dataclass
class Paged:
    """A random paged cache whose free slots are NaN, and rows of queries on it."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor
    scale: float
    keys: list[Tensor]  # per row [context, hk, d], as stored
    values: list[Tensor]

    def run(self, kernels: Kernels) -> Tensor:
        return kernels.paged_attention(
            self.q,
            self.k_cache,
            self.v_cache,
            self.page_table,
            self.query_start,
            self.context_lens,
            self.scale,
        )

    def only(self, row: int, first: int, last: int) -> Paged:
        """The queries `first:last` of one row alone, as a chunked run would ask for them."""
        start = int(self.query_start[row])
        count = int(self.query_start[row + 1]) - start
        return Paged(
            q=self.q[start + first : start + last],
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            page_table=self.page_table[row : row + 1].contiguous(),
            query_start=torch.tensor([0, last - first], dtype=torch.int32),
            context_lens=self.context_lens[row : row + 1] - (count - last),
            scale=self.scale,
            keys=self.keys[row : row + 1],
            values=self.values[row : row + 1],
        )


def paged(
    rows: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    dtype: torch.dtype,
    padding: int = 0,
    seed: int = 0,
) -> Paged:
    """`rows`: (query tokens, context tokens) each."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // page_size) for _, context in rows]
    num_pages = sum(needed) + 3
    order = torch.randperm(num_pages, generator=generator)
    table = torch.zeros(len(rows), max(needed, default=0), dtype=torch.int32)
    k_cache = torch.full((num_pages, kv_heads, dim, page_size), float("nan"), dtype=dtype)
    v_cache = torch.full((num_pages, kv_heads, page_size, dim), float("nan"), dtype=dtype)
    keys, values, used = [], [], 0
    for row, (_, context) in enumerate(rows):
        table[row, : needed[row]] = order[used : used + needed[row]]
        used += needed[row]
        k = torch.randn(context, kv_heads, dim, generator=generator).to(dtype)
        v = torch.randn(context, kv_heads, dim, generator=generator).to(dtype)
        for t in range(context):
            page = int(table[row, t // page_size])
            k_cache[page, :, :, t % page_size] = k[t]
            v_cache[page, :, t % page_size] = v[t]
        keys.append(k)
        values.append(v)
    counts = torch.tensor([0] + [n for n, _ in rows])
    total = int(counts.sum()) + padding
    wide = torch.randn(total, heads + 2, dim, generator=generator).to(dtype)
    return Paged(
        q=wide[:, :heads],  # strided, as a view of the merged q, k, v is
        k_cache=k_cache,
        v_cache=v_cache,
        page_table=table,
        query_start=counts.cumsum(0).int(),
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
        scale=dim**-0.5,
        keys=keys,
        values=values,
    )


def naive_attention(case: Paged) -> Tensor:
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    group = case.q.shape[1] // case.k_cache.shape[1]
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        start, end = int(case.query_start[row]), int(case.query_start[row + 1])
        for t in range(start, end):
            seen = keys.shape[0] - (end - 1 - t)
            for head in range(case.q.shape[1]):
                k, v = keys[:seen, head // group].double(), values[:seen, head // group].double()
                weights = torch.softmax(k @ case.q[t, head].double() * case.scale, dim=0)
                out[t, head] = weights @ v
    return out


MIXED_ROWS = [(1, 1), (1, 16), (5, 5), (1, 17), (40, 40), (7, 300), (1, 257), (0, 9), (19, 33), (1, 531)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"),
    [
        (9, 3, 64, 16),  # SmolLM2
        (8, 8, 64, 16),  # MHA
        (8, 1, 64, 32),  # MQA, more query heads than one register block
        (4, 2, 80, 16),
        (4, 2, 32, 32),
        (6, 2, 40, 16),
        (2, 1, 6, 16),
        (14, 2, 128, 48),
        (3, 3, 144, 16),
    ],
)
def test_attention_equals_a_plain_loop(
    kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, page_size: int
) -> None:
    case = paged(MIXED_ROWS, heads=heads, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype)
    assert_close(case.run(kernels), naive_attention(case), dtype)


def test_attention_of_padding_tokens_is_zero(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([(1, 20), (3, 3)], heads=4, kv_heads=2, dim=64, page_size=16, dtype=dtype, padding=12)
    for _ in range(3):  # fresh memory may be zero by luck
        out = case.run(kernels)
        assert torch.equal(out[4:], torch.zeros_like(out[4:]))


def test_attention_with_large_scores_stays_exact(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([(1, 400), (50, 400)], heads=2, kv_heads=1, dim=64, page_size=16, dtype=dtype)
    case.scale = 12.0  # weights span more than fp32's exponent: one token takes nearly all
    found = case.run(kernels)
    absolute = 1e-2 if dtype == torch.bfloat16 else 5e-4
    # scores of some hundreds carry fp32 rounding into the weights: 1e-4 is what fp32 can promise here
    torch.testing.assert_close(found.double(), naive_attention(case), rtol=absolute, atol=absolute)


def test_nan_query_harms_only_itself(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([(1, 30), (1, 40), (4, 50)], heads=4, kv_heads=2, dim=64, page_size=16, dtype=dtype)
    clean = case.run(kernels)
    case.q[1] = float("nan")
    found = case.run(kernels)
    assert torch.isnan(found[1].float()).all()
    others = [0, 2, 3, 4, 5]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("dim", [64, 40])
def test_attention_is_bit_equal_in_any_chunk_and_crowd(dtype: torch.dtype, dim: int) -> None:
    kernels = kernels_for("cpu", "cpu")
    rows = [(300, 300), (1, 290), (70, 600), (33, 40), (1, 1)]
    case = paged(rows, heads=9, kv_heads=3, dim=dim, page_size=16, dtype=dtype)
    together = case.run(kernels)
    for row, (count, _) in enumerate(rows):
        start = int(case.query_start[row])
        for size in (1, 7, 64, 1000):
            for first in range(0, count, size):
                last = min(first + size, count)
                alone = case.only(row, first, last).run(kernels)
                assert torch.equal(alone, together[start + first : start + last]), (row, size, first)


def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    kernels = kernels_for("cpu", "cpu")
    case = paged([(1, 300)] * 20 + [(90, 200)], heads=9, kv_heads=3, dim=64, page_size=16, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = case.run(kernels)
        torch.set_num_threads(3)
        assert torch.equal(case.run(kernels), single)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("width", [16, 24, 576, 1001])
def test_norms(kernels: Kernels, dtype: torch.dtype, tokens: int, width: int) -> None:
    x, residual = torch.randn(tokens, width + 5).to(dtype)[:, :width], torch.randn(tokens, width).to(dtype)
    weight = torch.randn(width).to(dtype)

    def norm(x: Tensor) -> Tensor:
        wide = x.double()
        return wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()

    assert_close(kernels.rms_norm(x, weight, 1e-5), norm(x), dtype)
    total = (x.float() + residual.float()).to(dtype)
    normed, new_residual = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, total)
    assert_close(normed, norm(total), dtype)


@pytest.mark.parametrize("inner", [16, 24, 1536, 37])
def test_silu_mul(kernels: Kernels, dtype: torch.dtype, inner: int) -> None:
    gate_up = (torch.randn(5, 2 * inner) * 8).to(dtype)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -88.0])
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(kernels.silu_mul(gate_up), gate / (1 + (-gate).exp()) * up, dtype)


@pytest.mark.parametrize("dim", [64, 80, 32, 40, 6])
def test_rope_rotates_views_in_place(kernels: Kernels, dtype: torch.dtype, dim: int) -> None:
    wide = torch.randn(11, 9, dim).to(dtype)
    angles = torch.rand(11, dim // 2) * 6
    wanted = wide.clone()
    for head in range(6):  # as complex numbers: channel i with channel i + d/2
        pairs = torch.complex(*wide[:, head].double().chunk(2, dim=1))
        turned = pairs * torch.polar(torch.ones_like(angles.double()), angles.double())
        wanted[:, head] = torch.cat((turned.real, turned.imag), dim=1).to(dtype)
    kernels.rope(wide[:, :4], wide[:, 4:6], angles.cos(), angles.sin())
    assert_close(wide, wanted, dtype)
    assert torch.equal(wide[:, 6:], wanted[:, 6:])


@pytest.mark.parametrize(("dim", "page_size"), [(64, 16), (40, 32), (6, 16)])
def test_store_kv_fills_its_slots_only(
    kernels: Kernels, dtype: torch.dtype, dim: int, page_size: int
) -> None:
    k_cache = torch.full((4, 3, dim, page_size), 7.0, dtype=dtype)
    v_cache = torch.full((4, 3, page_size, dim), 7.0, dtype=dtype)
    wide = torch.randn(6, 9, dim).to(dtype)
    slots = torch.tensor([0, -1, page_size - 1, page_size, 4 * page_size - 1, -1])
    kernels.store_kv(wide[:, :3], wide[:, 3:6], k_cache, v_cache, slots)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            assert torch.equal(k_cache[page, :, :, offset], wide[t, :3])
            assert torch.equal(v_cache[page, :, offset], wide[t, 3:6])
    assert int((k_cache != 7.0).any(dim=2).sum()) == 4 * 3
    assert int((v_cache != 7.0).any(dim=3).sum()) == 4 * 3


def test_small_operations_do_not_depend_on_the_row_count(dtype: torch.dtype) -> None:
    kernels = kernels_for("cpu", "cpu")
    x, weight = torch.randn(200, 576).to(dtype), torch.randn(576).to(dtype)
    normed, gated = kernels.rms_norm(x, weight, 1e-5), kernels.silu_mul(x)
    for count in (1, 2, 17, 130):
        assert torch.equal(kernels.rms_norm(x[:count], weight, 1e-5), normed[:count])
        assert torch.equal(kernels.silu_mul(x[:count]), gated[:count])


def test_nothing_to_do(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([], heads=4, kv_heads=2, dim=64, page_size=16, dtype=dtype)
    assert case.run(kernels).shape == (0, 4, 64)
    empty = torch.empty(0, 64, dtype=dtype)
    assert kernels.rms_norm(empty, torch.ones(64, dtype=dtype), 1e-5).shape == (0, 64)
    assert kernels.silu_mul(empty).shape == (0, 32)
    heads = torch.empty(0, 2, 64, dtype=dtype)
    angles = torch.empty(0, 32)
    kernels.rope(heads, heads, angles, angles)
    kernels.store_kv(heads, heads, case.k_cache, case.v_cache, torch.empty(0, dtype=torch.int64))


def test_nan_is_carried_not_hidden(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(2, 64).to(dtype)
    x[1, 3] = float("nan")
    weight = torch.ones(64, dtype=dtype)
    for out in (kernels.rms_norm(x, weight, 1e-5), kernels.silu_mul(x)):
        assert torch.isfinite(out[0].float()).all()
        assert torch.isnan(out[1].float()).any()


def test_reference_serves_float16() -> None:
    chosen = kernels_for("cpu", "auto", dtype=torch.float16)
    assert chosen is REFERENCE
    x = torch.randn(3, 64).half()
    assert math.isclose(
        float(chosen.rms_norm(x, torch.ones(64).half(), 1e-5).float().square().mean()), 1, rel_tol=0.01
    )
