"""The operation that does three at once: its bits are those of the three, one after another.

So they are in the interpreter. On a GPU a norm of heads whose d is no multiple of 16 may sum in another order.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from kernels import HeadNorms, PagedKV, kernels_for
from kernels.reference import KERNELS as REFERENCE
from tests.support.hopping import triton_kernels
from tests.support.paged import empty_cache, laid_out

TRITON = triton_kernels()
STORAGES = {"plain": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
PAGE_SIZE = 16
SLOTS = torch.tensor([40, -1, 0, 15, 31, -1, 16])


def heads_of(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, tokens: int = len(SLOTS)
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, heads of each, dim]: views of one tensor, some heads of which belong to none of them."""
    wide = (torch.randn(tokens, heads + 2 * kv_heads + 1, dim) * 3).to(dtype)
    q, k, v, _ = wide.split_with_sizes((heads, kv_heads, kv_heads, 1), dim=1)
    return q, k, v


def angles_of(rotary_dim: int, tokens: int = len(SLOTS)) -> tuple[Tensor, Tensor] | None:
    angles = torch.rand(tokens, rotary_dim // 2) * 6
    return (angles.cos(), angles.sin()) if rotary_dim else None


def cache_of(kv_heads: int, dim: int, dtype: torch.dtype, storage: torch.dtype | None) -> PagedKV:
    cache = empty_cache(3, kv_heads, dim, PAGE_SIZE, storage or dtype, scaled=storage is not None)
    return laid_out(cache, TRITON)


def at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor] | None,
    cache: PagedKV,
    slots: Tensor = SLOTS,
) -> None:
    assert TRITON.norm_rope_store is not None
    TRITON.norm_rope_store(q, k, v, norms, rotation, cache, slots)


def one_after_another(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor] | None,
    cache: PagedKV,
) -> Tensor:
    """What q becomes."""
    q, k = q.contiguous(), k.contiguous()
    if norms is not None:
        dim = q.shape[2]
        q = TRITON.rms_norm(q.view(-1, dim), norms.q, norms.eps, norms.offset).view(q.shape)
        k = TRITON.rms_norm(k.view(-1, dim), norms.k, norms.eps, norms.offset).view(k.shape)
    if rotation is not None:
        rotary_dim = 2 * rotation[0].shape[1]
        TRITON.rope(q[..., :rotary_dim], k[..., :rotary_dim], *rotation)
    TRITON.store_kv(k, v, cache, SLOTS)
    return q


def assert_same_bits(found: PagedKV, wanted: PagedKV) -> None:
    for field in fields(found):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        assert (one is None) == (other is None)
        if one is not None:
            one, other = (part.contiguous().view(torch.uint8) for part in (one, other))
            assert torch.equal(one, other), field.name


SLOW = pytest.mark.interpreted


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (torch.bfloat16, "int8"),
        (torch.float32, "plain"),
        pytest.param(torch.bfloat16, "plain", marks=SLOW),
        pytest.param(torch.bfloat16, "fp8", marks=SLOW),
        pytest.param(torch.float32, "int8", marks=SLOW),
        pytest.param(torch.float32, "fp8", marks=SLOW),
        pytest.param(torch.float16, "plain", marks=SLOW),
        pytest.param(torch.float16, "int8", marks=SLOW),
        pytest.param(torch.float16, "fp8", marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim", "normed", "offset"),
    [
        (9, 3, 64, 64, False, 0.0),  # SmolLM2
        (5, 2, 40, 16, True, 0.5),
        (4, 2, 24, 0, False, 0.0),
        pytest.param(16, 8, 128, 128, True, 0.0, marks=SLOW),  # Qwen3-0.6B
        pytest.param(5, 1, 256, 256, True, 1.0, marks=SLOW),  # Gemma 3
        pytest.param(6, 2, 96, 96, False, 0.0, marks=SLOW),
        pytest.param(3, 3, 80, 20, True, 0.0, marks=SLOW),
        pytest.param(71, 1, 6, 2, True, 0.0, marks=SLOW),
        pytest.param(33, 20, 64, 0, True, 0.0, marks=SLOW),
    ],
)
def test_it_does_what_the_three_do(
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int,
    normed: bool,
    offset: float,
    dtype: torch.dtype,
    storage: str,
) -> None:
    q, k, v = heads_of(heads, kv_heads, dim, dtype)
    q[2, 0], k[3, 0], v[4, 0] = 0.0, 0.0, 0.0
    q_weight, k_weight = torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)
    norms = HeadNorms(q_weight, k_weight, 1e-6, offset) if normed else None
    rotation = angles_of(rotary_dim)
    found, wanted = (cache_of(kv_heads, dim, dtype, STORAGES[storage]) for _ in range(2))
    q_wanted = one_after_another(q, k, v, norms, rotation, wanted)
    whole = q._base
    assert whole is not None
    before = whole.clone()
    at_once(q, k, v, norms, rotation, found)
    assert torch.equal(whole[:, heads:], before[:, heads:])
    if normed and dim % 16 and torch.cuda.is_available():
        torch.testing.assert_close(q, q_wanted, rtol=1.2e-2, atol=1e-2)
        if STORAGES[storage] is None:
            torch.testing.assert_close(found.keys, wanted.keys, rtol=1.2e-2, atol=1e-2, equal_nan=True)
    else:
        assert torch.equal(q, q_wanted)
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("storage", ["plain", "int8", pytest.param("fp8", marks=SLOW)])
def test_a_failure_stays_with_its_head(storage: str) -> None:
    q, k, v = heads_of(4, 2, 48, torch.bfloat16)
    q[0, 1, 3], k[0, 1, 20], k[2, 0, 47], v[3, 1, 0] = (float(bad) for bad in ("nan", "nan", "inf", "-inf"))
    norms, rotation = HeadNorms(torch.ones(48).bfloat16(), torch.ones(48).bfloat16(), 1e-6), angles_of(16)
    found, wanted = (cache_of(2, 48, torch.bfloat16, STORAGES[storage]) for _ in range(2))
    q_wanted = one_after_another(q, k, v, norms, rotation, wanted)
    at_once(q, k, v, norms, rotation, found)
    torch.testing.assert_close(q, q_wanted, rtol=0, atol=0, equal_nan=True)
    assert q.isnan().any(dim=2).nonzero().tolist() == [[0, 1]]
    for one, other in ((found.keys, wanted.keys), (found.values, wanted.values)):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)
    if found.key_scales is not None and found.value_scales is not None:
        for slot, head in ((40, 1), (0, 0), (15, 1)):
            assert found.key_scales[slot // PAGE_SIZE, head, slot % PAGE_SIZE].isnan()
        assert found.value_scales[0, 1, 15] == 0
        stored = [int(slot) for slot in SLOTS if slot >= 0]
        for scales, bad in ((found.key_scales, 3), (found.value_scales, 0)):
            assert int(scales.transpose(1, 2).reshape(-1, 2)[stored].isnan().sum()) == bad


def test_a_token_does_not_depend_on_its_crowd() -> None:
    q, k, v = heads_of(6, 2, 40, torch.bfloat16)
    norms, rotation = HeadNorms(torch.randn(40).bfloat16(), torch.randn(40).bfloat16(), 1e-6), angles_of(16)
    assert rotation is not None
    together, alone = (cache_of(2, 40, torch.bfloat16, torch.int8) for _ in range(2))
    for t in range(len(SLOTS)):
        one = slice(t, t + 1)
        single = q[one].clone()
        at_once(single, k[one], v[one], norms, (rotation[0][one], rotation[1][one]), alone, SLOTS[one])
        whole = q.clone()
        at_once(whole, k, v, norms, rotation, together)
        assert torch.equal(single, whole[one])
    assert_same_bits(together, alone)


def test_no_token_is_allowed() -> None:
    q, k, v = heads_of(4, 2, 40, torch.float32, tokens=0)
    cache = cache_of(2, 40, torch.float32, None)
    at_once(q, k, v, None, angles_of(40, tokens=0), cache, torch.empty(0, dtype=torch.int64))


def test_the_plain_sets_have_no_use_for_it() -> None:
    assert REFERENCE.norm_rope_store is None
    assert kernels_for("cpu", "cpu").norm_rope_store is None


def test_a_pool_of_more_than_two_giga_elements() -> None:
    """Memory that is only reserved: its last page is written, the others never touched."""
    dim = 64
    pages = 2**31 // (dim * PAGE_SIZE) + 3
    far = PagedKV(
        torch.empty((pages, 1, PAGE_SIZE, dim), dtype=torch.int8).transpose(2, 3),
        torch.empty((pages, 1, PAGE_SIZE, dim), dtype=torch.int8),
        torch.empty((pages, 1, PAGE_SIZE), dtype=torch.bfloat16),
        torch.empty((pages, 1, PAGE_SIZE), dtype=torch.bfloat16),
    )
    near = cache_of(1, dim, torch.float32, torch.int8)
    q, k, v = heads_of(1, 1, dim, torch.float32, tokens=2)
    slots = torch.tensor([1, 7])
    for cache, first in ((near, 0), (far, pages - 1)):
        at_once(q, k, v, None, None, cache, slots + first * PAGE_SIZE)
    for field in fields(near):
        for slot in (1, 7):
            one, other = getattr(far, field.name)[-1], getattr(near, field.name)[0]
            axis = 2 if field.name == "keys" else 1
            assert torch.equal(one.select(axis, slot), other.select(axis, slot)), field.name
