"""Every kernel set keeps the contract written in `kernels`: one suite over sets, dtypes and odd shapes.

The yardstick is the reference set in fp32 on the same (rounded) inputs, and for the reference set itself a
plain loop in float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import Attention, Kernels, PagedKV, kernels_for
from kernels.attending import LIMITS
from kernels.reference import KERNELS as REFERENCE
from tests.support.close import assert_close
from tests.support.paged import empty_cache, laid_out, naive_attention, paged

EIGHT_BITS = pytest.mark.parametrize("storage", ["int8", "fp8"], indirect=True)

MIXED_ROWS = [(1, 1), (1, 16), (5, 5), (1, 17), (40, 40), (7, 300), (1, 257), (0, 9), (19, 33), (1, 531)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"),
    [
        (9, 3, 64, 16),  # SmolLM2
        (8, 8, 64, 64),  # MHA
        (8, 1, 64, 32),  # MQA, more query heads than one register block
        (4, 2, 80, 16),
        (4, 2, 32, 48),
        (6, 2, 40, 16),
        (2, 1, 6, 64),
        (14, 2, 128, 64),
        (3, 3, 144, 64),
    ],
)
def test_attention_equals_a_plain_loop(
    kernels: Kernels,
    dtype: torch.dtype,
    storage: torch.dtype | None,
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
) -> None:
    case = paged(
        MIXED_ROWS,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        dtype=dtype,
        storage=storage,
    )
    assert_close(case.run(kernels), naive_attention(case), dtype)


@pytest.mark.parametrize(
    "how",
    [None, Attention(0.2, window=20), Attention(0.2, sinks=torch.linspace(0.5, 6.0, 6))],
    ids=["plain", "window", "sinks"],
)
def test_rows_of_one_query_need_no_starts(
    kernels: Kernels, dtype: torch.dtype, storage: torch.dtype | None, how: Attention | None
) -> None:
    """What is left out says that each row has one; rows without a context are padding."""
    rows = [(1, 1), (1, 531), (1, 20), (1, 512)]
    case = paged(
        rows, heads=6, kv_heads=2, dim=40, page_size=64, dtype=dtype, storage=storage, how=how, padding=3
    )
    wanted = case.run(kernels)
    table = torch.full((7, case.page_table.shape[1]), 2**30, dtype=torch.int32)
    lens = torch.zeros(7, dtype=torch.int32)
    q = torch.empty_like(case.q)
    places, rest = [0, 2, 3, 5], [1, 4, 6]  # padding may lie between
    table[places], lens[places] = case.page_table, case.context_lens
    q[places], q[rest] = case.q[:4], case.q[4:]
    cache = laid_out(case.cache, kernels)
    for _ in range(3):  # fresh memory may be zero by luck
        found = kernels.paged_attention(q, cache, table, None, lens, case.how)
        assert torch.equal(found[places], wanted[:4])
        assert torch.equal(found[rest], torch.zeros_like(found[rest]))


def test_attention_of_padding_tokens_is_zero(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([(1, 20), (3, 3)], heads=4, kv_heads=2, dim=64, page_size=16, dtype=dtype, padding=12)
    for _ in range(3):  # fresh memory may be zero by luck
        out = case.run(kernels)
        assert torch.equal(out[4:], torch.zeros_like(out[4:]))


def test_attention_with_large_scores_stays_exact(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([(1, 400), (50, 400)], heads=2, kv_heads=1, dim=64, page_size=64, dtype=dtype)
    case.how = Attention(12.0)  # weights span more than fp32's exponent: one token takes nearly all
    found = case.run(kernels)
    absolute = 1e-2 if dtype == torch.bfloat16 else 5e-4
    # scores of some hundreds carry fp32 rounding into the weights: 1e-4 is what fp32 can promise here
    torch.testing.assert_close(found.double(), naive_attention(case), rtol=absolute, atol=absolute)


def test_nan_query_harms_only_itself(
    kernels: Kernels, dtype: torch.dtype, storage: torch.dtype | None
) -> None:
    rows = [(1, 30), (1, 40), (4, 50)]
    case = paged(rows, heads=4, kv_heads=2, dim=64, page_size=16, dtype=dtype, storage=storage)
    clean = case.run(kernels)
    case.q[1] = float("nan")
    found = case.run(kernels)
    assert torch.isnan(found[1].float()).all()
    others = [0, 2, 3, 4, 5]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"), [(9, 3, 64, 16), (3, 3, 40, 64), (8, 1, 6, 16)]
)
@pytest.mark.parametrize(("keys", "values"), [(True, True), (True, False), (False, True)])
def test_nan_behind_a_query_changes_no_bit(
    kernels: Kernels,
    dtype: torch.dtype,
    storage: torch.dtype | None,
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    keys: bool,
    values: bool,
) -> None:
    """Two requests that share pages never harm each other by what lies behind the shared part."""
    count, context = 21, 268  # over the end of a block of 256
    rows = [(count, context), (3, 30)]
    case = paged(
        rows, heads=heads, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype, storage=storage
    )
    clean = case.run(kernels)
    interpreted = kernels.name == "triton" and not torch.cuda.is_available()  # where each run takes a second
    # the first `seen` queries do not see the token
    for seen in (1, 9, 20) if interpreted else (1, 2, 3, 5, 8, 9, 15, 16, 20):
        first = context - count + seen
        for spoilt in ([first], range(first, context)):
            by = float("inf") if values and not keys else float("nan")
            found = case.spoil(kernels, 0, spoilt, keys=keys, values=values, by=by).run(kernels)
            assert torch.equal(found[:seen], clean[:seen]), seen
            assert torch.equal(found[count:], clean[count:]), seen
            assert not torch.isfinite(found[seen:count].float()).any(), seen  # those that see it tell


@pytest.mark.parametrize("dim", [64, 40])
def test_attention_is_bit_equal_in_any_chunk_and_crowd(
    dtype: torch.dtype, cpu_storage: torch.dtype | None, dim: int
) -> None:
    kernels = kernels_for("cpu", "cpu")
    rows = [(300, 300), (1, 290), (70, 600), (33, 40), (1, 1)]
    case = paged(rows, heads=9, kv_heads=3, dim=dim, page_size=16, dtype=dtype, storage=cpu_storage)
    together = case.run(kernels)
    for row, (count, _) in enumerate(rows):
        start = int(case.query_start[row])
        for size in (1, 7, 64, 1000):
            for first in range(0, count, size):
                last = min(first + size, count)
                alone = case.only(row, first, last).run(kernels)
                assert torch.equal(alone, together[start + first : start + last]), (row, size, first)


def test_results_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, cpu_storage: torch.dtype | None
) -> None:
    kernels = kernels_for("cpu", "cpu")
    rows = [(1, 300)] * 20 + [(90, 200)]
    case = paged(rows, heads=9, kv_heads=3, dim=64, page_size=16, dtype=dtype, storage=cpu_storage)
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
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(kernels: Kernels, dtype: torch.dtype, tokens: int, width: int, offset: float) -> None:
    x, residual = torch.randn(tokens, width + 5).to(dtype)[:, :width], torch.randn(tokens, width).to(dtype)
    weight = torch.randn(width).to(dtype)

    def norm(x: Tensor) -> Tensor:
        wide = x.double()
        return wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)

    assert_close(kernels.rms_norm(x, weight, 1e-5, offset), norm(x), dtype)
    total = (x.float() + residual.float()).to(dtype)
    normed, new_residual = kernels.add_rms_norm(x, residual, weight, 1e-5, offset)
    assert torch.equal(new_residual, total)
    assert_close(normed, norm(total), dtype)


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


@pytest.mark.parametrize(("dim", "rotated"), [(64, 48), (40, 16), (16, 2), (128, 96)])
def test_rope_rotates_the_first_channels_and_leaves_the_others(
    kernels: Kernels, dtype: torch.dtype, dim: int, rotated: int
) -> None:
    wide = torch.randn(33, 8, dim).to(dtype)  # q, k and v in one
    before = wide.clone()
    angles = torch.rand(33, rotated // 2) * 6
    kernels.rope(wide[:, :4, :rotated], wide[:, 4:6, :rotated], angles.cos(), angles.sin())
    expected = before[:, :6, :rotated].contiguous()
    kernels.rope(expected[:, :4], expected[:, 4:6], angles.cos(), angles.sin())
    assert torch.equal(wide[:, :6, :rotated], expected)
    assert not torch.equal(expected, before[:, :6, :rotated])
    assert torch.equal(wide[:, :6, rotated:], before[:, :6, rotated:])
    assert torch.equal(wide[:, 6:], before[:, 6:])


@pytest.mark.parametrize(("dim", "page_size"), [(64, 16), (40, 32), (6, 16)])
def test_store_kv_fills_its_slots_only(
    kernels: Kernels, dtype: torch.dtype, dim: int, page_size: int
) -> None:
    k_cache = torch.full((4, 3, dim, page_size), 7.0, dtype=dtype)
    v_cache = torch.full((4, 3, page_size, dim), 7.0, dtype=dtype)
    cache = laid_out(PagedKV(k_cache, v_cache), kernels)
    k_cache = cache.keys
    wide = torch.randn(6, 9, dim).to(dtype)
    slots = torch.tensor([0, -1, page_size - 1, page_size, 4 * page_size - 1, -1])
    kernels.store_kv(wide[:, :3], wide[:, 3:6], cache, slots)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            assert torch.equal(k_cache[page, :, :, offset], wide[t, :3])
            assert torch.equal(v_cache[page, :, offset], wide[t, 3:6])
    assert int((k_cache != 7.0).any(dim=2).sum()) == 4 * 3
    assert int((v_cache != 7.0).any(dim=3).sum()) == 4 * 3


@pytest.mark.parametrize("dim", [64, 40, 6])
def test_a_value_that_is_not_finite_is_zeros_under_a_key_of_nan(
    kernels: Kernels, dtype: torch.dtype, storage: torch.dtype | None, dim: int
) -> None:
    """So a weight of 0 hides it. The token's other heads, and a key that is not finite, are stored as they are."""
    cache = laid_out(empty_cache(1, 2, dim, 16, storage or dtype, scaled=storage is not None), kernels)
    k, v = torch.randn(5, 4, dim).to(dtype).split(2, dim=1)
    v[1, 0, dim - 1], v[2, 1, 0], v[3, 1, 3], k[4, 0, 1] = (
        float(bad) for bad in ("nan", "inf", "-inf", "nan")
    )
    kernels.store_kv(k, v, cache, torch.arange(5))
    keys, values = cache.keys[0, :, :, :5].float(), cache.values[0, :, :5].float()  # [hk, d, t], [hk, t, d]
    if cache.key_scales is not None and cache.value_scales is not None:
        keys = keys * cache.key_scales[0, :, None, :5].float()
        values = values * cache.value_scales[0, :, :5, None].float()
    assert keys.isnan().all(dim=1).nonzero().tolist() == (
        [[0, 1], [1, 2], [1, 3]] if storage is None else [[0, 1], [0, 4], [1, 2], [1, 3]]
    )
    assert (values == 0).all(dim=2).nonzero().tolist() == [[0, 1], [1, 2], [1, 3]]
    assert values.isfinite().all()


def awkward_vectors(dim: int, dtype: torch.dtype) -> Tensor:
    """[13, 5, dim]: all sizes that a dtype holds, ties between two steps, and a vector of zeros."""
    x = torch.randn(13, 5, dim)
    for t, size in enumerate((1.0, 1e-3, 3e4, 1e30, 2e38, 1e-30, 1e-37, 1e-40, 3e-44)):
        x[t] = (x[t] / x[t].abs().amax(-1, keepdim=True)) * size
    x[9] = 0.0
    x[10, :, : dim // 2] = 0.5
    x[10, :, 0] = 127.0  # with scale 1: ties
    return x.to(dtype)


@pytest.mark.parametrize(("dim", "page_size"), [(64, 16), (40, 32), (6, 16)])
@EIGHT_BITS
def test_eight_bits_keep_what_the_contract_says(
    kernels: Kernels, dtype: torch.dtype, storage: torch.dtype, dim: int, page_size: int
) -> None:
    x = awkward_vectors(dim, dtype)
    slots = torch.randperm(2 * page_size)[: len(x)]
    cache = laid_out(empty_cache(3, 2, dim, page_size, storage, scaled=True), kernels)
    kernels.store_kv(x[:, :2], x[:, 3:5], cache, slots)
    assert cache.key_scales is not None
    assert cache.value_scales is not None
    page, offset = slots // page_size, slots % page_size
    read_k, read_v = cache.keys.float()[page, :, :, offset], cache.values.float()[page, :, offset]
    for given, stored, scales in (
        (x[:, :2], read_k, cache.key_scales[page, :, offset]),
        (x[:, 3:5], read_v, cache.value_scales[page, :, offset]),
    ):
        largest, limit = given.double().abs().amax(-1), LIMITS[storage]
        below = (scales.view(torch.int16) - 1).view(torch.bfloat16).double()  # the next smaller scale
        assert (scales.double() * limit * (1 + 1e-6) >= largest).all(), "a scale that clips"
        assert ((below * limit < largest) | (scales == 0)).all(), "a scale that wastes a step"
        assert torch.equal(scales == 0, largest == 0)
        ratio = torch.where(scales[..., None] > 0, given.float() / scales.float()[..., None], 0.0)
        wanted = ratio.round() if storage == torch.int8 else ratio.to(storage).float()
        assert torch.equal(stored, wanted)
        assert stored.abs().max() == limit
    free = torch.ones(3 * page_size, dtype=torch.bool)
    free[slots] = False
    for scales in (cache.key_scales, cache.value_scales):
        assert scales.transpose(1, 2).reshape(-1, 2)[free].isnan().all()


@EIGHT_BITS
def test_eight_bits_of_a_token_depend_on_its_vector_alone(
    kernels: Kernels, dtype: torch.dtype, storage: torch.dtype
) -> None:
    """Nor on the set: both store the same bits. A failure stays with its head of its token, and shows."""
    x = awkward_vectors(40, dtype)
    x[1, 0, 3], x[2, 4, 39], x[3, 1, 0] = float("nan"), float("inf"), float("-inf")
    together, alone, reference = (
        laid_out(empty_cache(1, 2, 40, 16, storage, scaled=True), kernels) for _ in range(3)
    )
    slots = torch.arange(len(x))
    kernels.store_kv(x[:, :2], x[:, 3:5], together, slots)
    REFERENCE.store_kv(x[:, :2], x[:, 3:5], reference, slots)
    for t in range(len(x)):
        kernels.store_kv(x[t : t + 1, :2], x[t : t + 1, 3:5], alone, slots[t : t + 1])
    for name in ("keys", "values", "key_scales", "value_scales"):
        bits = [getattr(cache, name).contiguous().view(torch.uint8) for cache in (together, alone, reference)]
        assert torch.equal(bits[0], bits[1])
        assert torch.equal(bits[0], bits[2])
    assert together.key_scales is not None
    assert together.value_scales is not None
    assert together.key_scales[0, :, : len(x)].isnan().nonzero().tolist() == [[0, 1], [1, 2], [1, 3]]
    assert together.value_scales[0, 1, 2] == 0


def test_norms_do_not_depend_on_the_row_count(dtype: torch.dtype) -> None:
    kernels = kernels_for("cpu", "cpu")
    x, weight = torch.randn(200, 576).to(dtype), torch.randn(576).to(dtype)
    normed = kernels.rms_norm(x, weight, 1e-5)
    for count in (1, 2, 17, 130):
        assert torch.equal(kernels.rms_norm(x[:count], weight, 1e-5), normed[:count])


def test_nothing_to_do(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([], heads=4, kv_heads=2, dim=64, page_size=16, dtype=dtype)
    assert case.run(kernels).shape == (0, 4, 64)
    empty = torch.empty(0, 64, dtype=dtype)
    assert kernels.rms_norm(empty, torch.ones(64, dtype=dtype), 1e-5).shape == (0, 64)
    heads = torch.empty(0, 2, 64, dtype=dtype)
    angles = torch.empty(0, 32)
    kernels.rope(heads, heads, angles, angles)
    kernels.store_kv(heads, heads, laid_out(case.cache, kernels), torch.empty(0, dtype=torch.int64))


def test_nan_is_carried_not_hidden(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(2, 64).to(dtype)
    x[1, 3] = float("nan")
    weight = torch.ones(64, dtype=dtype)
    out = kernels.rms_norm(x, weight, 1e-5)
    assert torch.isfinite(out[0].float()).all()
    assert torch.isnan(out[1].float()).any()


def test_reference_serves_float16() -> None:
    chosen = kernels_for("cpu", "auto", dtype=torch.float16)
    assert chosen is REFERENCE
    x = torch.randn(3, 64).half()
    assert math.isclose(
        float(chosen.rms_norm(x, torch.ones(64).half(), 1e-5).float().square().mean()), 1, rel_tol=0.01
    )
