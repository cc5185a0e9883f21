"""Attention of rows that share a prefix: the hint that says so changes no result, whatever a set makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import Attention, Kernels, SharedPrefixes
from kernels.gpu import launch
from tests.support.close import assert_close
from tests.support.hopping import triton_kernels
from tests.support.paged import Layout, Paged, hinted, laid_out, naive_attention, paged, sharing

TRITON = triton_kernels()
PADDING = 2  # rows without a context, behind the others

LAYOUTS: dict[str, Layout] = {  # a split is 512 tokens
    "a whole split": ([20, 513, 530, 600, 512, 300], [([2, 1, 4, 5], 512)]),
    "part of a split": ([700, 640, 616, 90, 1030], [([4, 1, 2, 0], 600)]),
    "three splits": ([1540, 1700, 40, 1537, 1610, 1000], [([0, 3, 4, 1, 5], 1536)]),
    "two groups and none": (
        [600, 601, 560, 1100, 1080, 513, 1025, 777, 1040],
        [([0, 2, 5, 7], 520), ([], 0), ([3, 8, 4, 6], 1024)],
    ),
    "more than a block": ([513 + row for row in range(20)], [(list(range(20)), 512)]),
}


def padded(layout: str, *, heads: int = 2, **shape: Any) -> tuple[Paged, SharedPrefixes]:
    """A step of one query a row, with padding, and its hint."""
    case, hint = hinted(LAYOUTS[layout], heads=heads, padding=PADDING, **shape)
    nowhere = torch.full((PADDING, case.page_table.shape[1]), 2**30, dtype=torch.int32)
    nothing = torch.zeros(PADDING, dtype=torch.int32)
    return (
        replace(
            case,
            page_table=torch.cat((case.page_table, nowhere)),
            context_lens=torch.cat((case.context_lens, nothing)),
        ),
        replace(hint, tokens=torch.cat((hint.tokens, nothing))),
    )


def attend(kernels: Kernels, case: Paged, hint: SharedPrefixes | None) -> Tensor:
    cache = laid_out(case.cache, kernels)
    return kernels.paged_attention(case.q, cache, case.page_table, None, case.context_lens, case.how, hint)


@pytest.mark.parametrize(("layout", "group"), list(zip(LAYOUTS, (7, 2, 1, 1, 2), strict=True)))
def test_rows_that_share_equal_a_plain_loop(
    kernels: Kernels, dtype: torch.dtype, storage: torch.dtype | None, layout: str, group: int
) -> None:
    page_size = 64 if storage is None else 16
    case, hint = padded(
        layout, heads=2 * group, kv_heads=2, dim=24, dtype=dtype, storage=storage, page_size=page_size
    )
    wanted = naive_attention(case)
    assert_close(attend(kernels, case, hint), wanted, dtype)
    assert_close(attend(kernels, case, None), wanted, dtype)


HOWS = {
    "softcap": Attention(0.2, softcap=2.0),
    "slopes": Attention(0.2, slopes=torch.tensor([0.01, 0.3])),
    "sinks": Attention(0.2, sinks=torch.tensor([-1.0, 6.0])),
    "window": Attention(0.2, window=530),
    "wide window": Attention(0.2, window=4000),
}


@pytest.mark.parametrize("how", HOWS)
def test_options(kernels: Kernels, how: str) -> None:
    case, hint = padded("part of a split", dtype=torch.float32, how=HOWS[how], page_size=64)
    assert_close(attend(kernels, case, hint), naive_attention(case), torch.float32)


def test_the_hint_changes_no_bit_where_rows_have_starts(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([(2, 520), (1, 520)], heads=2, kv_heads=1, dim=16, page_size=16, dtype=dtype)
    case, hint = sharing(case, [([0, 1], 512)], 2)
    cache = laid_out(case.cache, kernels)
    found = kernels.paged_attention(
        case.q, cache, case.page_table, case.query_start, case.context_lens, case.how, hint
    )
    assert torch.equal(found, case.run(kernels))


@pytest.mark.parametrize(("keys", "values"), [(True, False), (False, True)])
def test_nan_meets_the_rows_that_see_it_and_no_others(kernels: Kernels, keys: bool, values: bool) -> None:
    """In a split that is shared, in one that is shared in part, and behind all that is shared."""
    case, hint = padded("part of a split")
    clean = attend(kernels, case, hint)
    for token, seeing in ((100, [0, 1, 2, 4]), (599, [0, 1, 2, 4]), (618, [4])):
        blind = [row for row in range(5) if row not in seeing]
        found = attend(kernels, case.spoil(kernels, 4, [token], keys=keys, values=values), hint)
        assert torch.equal(found[blind], clean[blind]), token
        assert not torch.isfinite(found[seeing]).any(), token


def test_a_context_that_ends_in_the_shared_split(kernels: Kernels) -> None:
    """Its row is a member, and meets nothing of what the others see behind its end."""
    case, hint = padded("a whole split")
    clean = attend(kernels, case, hint)
    found = attend(kernels, case.spoil(kernels, 2, [300, 400], keys=True, values=True), hint)
    assert torch.equal(found[[0, 3, 5]], clean[[0, 3, 5]])
    assert not torch.isfinite(found[[1, 2, 4]]).any()


@pytest.mark.parametrize("kernels", ["cpu", "triton"], indirect=True)
def test_shared_pages_are_read_through_one_row(kernels: Kernels) -> None:
    """Where the tables of the others say nothing, no bit changes: so K and V are not read for each row."""
    case, hint = padded("two groups and none")
    table = case.page_table.clone()
    table[[0, 2, 5], :32] = 2**30
    table[[3, 4, 6], :64] = 2**30
    assert torch.equal(attend(kernels, case, hint), attend(kernels, replace(case, page_table=table), hint))


@pytest.mark.parametrize(
    "kernels", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.interpreted)], indirect=True
)
def test_more_heads_of_one_kv_head_than_a_block_holds(kernels: Kernels) -> None:
    case, hint = padded("part of a split", heads=71, dtype=torch.float32)
    assert_close(attend(kernels, case, hint), naive_attention(case), torch.float32)


def test_every_element_is_written(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: results, and what the kernels leave for each other."""
    case, hint = padded("two groups and none")
    clean, empty = attend(kernels, case, hint), torch.empty

    def poisoned(*size: Any, **kind: Any) -> Tensor:
        found = empty(*size, **kind)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(attend(kernels, case, hint), clean)
    assert torch.equal(clean[-PADDING:], torch.zeros_like(clean[-PADDING:]))


def test_the_launch_is_the_same_for_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who shares what stays on the device."""
    grids: list[Any] = []

    class Recorded:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: grids.append((grid, options))

    for name in ("prefix", "single", "reduce"):
        monkeypatch.setattr(launch, name, Recorded())
    case, hint = padded("two groups and none")
    attend(TRITON, case, hint)
    first = list(grids)
    grids.clear()
    attend(
        TRITON,
        case,
        SharedPrefixes(*(torch.zeros_like(one) for one in (hint.tokens, hint.members, hint.starts))),
    )
    assert len(first) == 3
    assert grids == first
