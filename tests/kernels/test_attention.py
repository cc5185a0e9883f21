"""Attention over pages, in every set, with every dtype, kind of cache and odd shapes: the numbers of a plain loop in
float64, padding that is zero, NaN that harms only those who see it, and on the cpu set the same bits in any crowd.
"""

from __future__ import annotations

import pytest
import torch

from kernels import Attention, Kernels, kernels_for
from tests.support.close import assert_close
from tests.support.paged import laid_out, naive_attention, paged

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
