"""Storing K and V into pages: in the slots that are named only, finite values, 8 bits by the rule of the contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import Kernels, PagedKV
from kernels.attending import LIMITS
from kernels.reference import KERNELS as REFERENCE
from tests.support.paged import empty_cache, laid_out

EIGHT_BITS = pytest.mark.parametrize("storage", ["int8", "fp8"], indirect=True)


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
