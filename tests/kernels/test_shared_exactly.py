"""Sets whose sharing is exact: rows that share a prefix have the bits that each of them has alone.

Here that is the cpu set, on blocks of 256 tokens. What any set must do with a hint stands in `test_shared_prefixes`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import Attention, Kernels, SharedPrefixes, kernels_for
from tests.support.paged import Layout, Paged, hinted, paged, sharing

CPU = kernels_for("cpu", "cpu")
DTYPES = [torch.bfloat16, torch.float32]
NOWHERE = 2**30  # a page that is none

LAYOUTS: dict[str, Layout] = {
    "a block, to its end": ([257, 300, 256, 700], [([0, 1, 2, 3], 256)]),
    "not a multiple of a block": ([800, 701, 760, 90, 1030], [([4, 1, 2, 0], 697)]),
    "less than a block": ([300, 301, 400], [([0, 1, 2], 250)]),
    "two groups and none": (
        [600, 601, 560, 1100, 1080, 513, 1025, 777, 1040],
        [([7, 2, 5, 0, 1], 520), ([], 0), ([3, 8, 4, 6], 1024)],
    ),
    "more than a context holds": ([900, 300, 40, 1000, 600], [([0, 1, 2, 3, 4], 800)]),
    "more than an item": ([513 + 3 * row for row in range(40)], [(list(range(40)), 512)]),
    "one row": ([600, 600], [([1], 512)]),
}


def shared(layout: str, *, heads: int = 3, **shape: Any) -> tuple[Paged, SharedPrefixes]:
    return hinted(LAYOUTS[layout], heads=heads, **shape)


def attend(case: Paged, hint: SharedPrefixes | None, kernels: Kernels = CPU) -> Tensor:
    return kernels.paged_attention(
        case.q, case.cache, case.page_table, case.query_start, case.context_lens, case.how, hint
    )


def test_the_set_says_so() -> None:
    assert CPU.sharing is not None
    assert CPU.sharing.exact


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_of_rows_that_walk_alone(
    layout: str, dtype: torch.dtype, cpu_storage: torch.dtype | None
) -> None:
    case, hint = shared(layout, kv_heads=2, heads=6, dim=24, dtype=dtype, storage=cpu_storage)
    alone = attend(case, None)
    assert alone.isfinite().all()
    assert torch.equal(attend(case, hint), alone)
    for row in range(len(case.context_lens)):
        assert torch.equal(attend(case.only(row, 0, 1), None), alone[row : row + 1])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"),
    [
        (1, 1, 1, 16),
        (4, 2, 5, 48),
        (5, 5, 64, 32),
        (9, 3, 64, 16),
        (7, 1, 80, 16),
        (12, 1, 127, 64),
        (40, 2, 96, 256),
    ],
)
def test_shapes_of_heads_and_pages(
    heads: int, kv_heads: int, dim: int, page_size: int, cpu_storage: torch.dtype | None
) -> None:
    for layout in ("not a multiple of a block", "two groups and none"):
        case, hint = shared(
            layout, heads=heads, kv_heads=kv_heads, dim=dim, page_size=page_size, storage=cpu_storage
        )
        assert torch.equal(attend(case, hint), attend(case, None)), layout


@pytest.mark.parametrize(
    "how",
    [
        Attention(0.2, softcap=2.0),
        Attention(0.2, slopes=torch.tensor([0.01, 0.3, 0.0])),
        Attention(0.2, sinks=torch.tensor([-1.0, 3.0, 7.0])),
        Attention(0.2, window=600),
        Attention(
            0.2,
            window=4000,
            softcap=3.0,
            slopes=torch.tensor([0.1, 0.02, 0.03]),
            sinks=torch.tensor([1.0, 2.0, 3.0]),
        ),
        Attention(40.0),
    ],
    ids=["softcap", "slopes", "sinks", "window", "all", "large scores"],
)
def test_options(how: Attention) -> None:
    for layout in ("not a multiple of a block", "two groups and none"):
        case, hint = shared(layout, how=how)
        assert torch.equal(attend(case, hint), attend(case, None)), layout


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_no_bit(threads: int) -> None:
    case, hint = shared("more than an item", heads=4, kv_heads=2)
    alone, before = attend(case, None), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(attend(case, hint), alone)
    finally:
        torch.set_num_threads(before)


def test_rows_of_many_queries_stay_alone() -> None:
    """They may be members; those of one query share without them."""
    rows = [(1, 700), (70, 640), (1, 600), (0, 600), (1, 900)]
    case = paged(rows, heads=4, kv_heads=2, dim=32, page_size=16, dtype=torch.bfloat16, padding=3)
    case, hint = sharing(case, [([0, 1, 2, 3, 4], 520)], 5)
    alone = attend(case, None)
    assert torch.equal(attend(case, hint), alone)
    assert torch.equal(alone[-3:], torch.zeros_like(alone[-3:]))
    table = case.page_table.clone()
    table[[0, 2], :32] = NOWHERE
    assert torch.equal(attend(replace(case, page_table=table), hint), alone)


def test_the_shared_blocks_are_read_through_one_page_table() -> None:
    """So the path was taken, and only for whole blocks: where the other tables say nothing no bit changes."""
    case, hint = shared("not a multiple of a block")
    table = case.page_table.clone()
    table[[0, 1, 2], : 512 // 16] = NOWHERE
    assert torch.equal(attend(replace(case, page_table=table), hint), attend(case, None))


def test_a_window_keeps_its_rows_alone() -> None:
    """Of five rows two see everything, and read through one table."""
    case, hint = shared("two groups and none", how=Attention(0.2, window=570))
    assert torch.equal(attend(case, hint), attend(case, None))
    table = case.page_table.clone()
    table[2, :32] = NOWHERE  # context 560; the other one that shares and sees it all is row 5
    assert torch.equal(attend(replace(case, page_table=table), hint), attend(case, None))


@pytest.mark.parametrize(("keys", "values"), [(True, False), (False, True)])
def test_nan_meets_the_rows_that_see_it_and_no_others(keys: bool, values: bool) -> None:
    """In a block that is shared, in one of which a part is, and behind a row's end."""
    case, hint = shared("more than a context holds")
    clean = attend(case, hint)
    for token, seeing in ((100, [0, 1, 3, 4]), (290, [0, 1, 3, 4]), (500, [0, 3, 4]), (790, [0, 3])):
        spoiled = case.spoil(CPU, 0, [token], keys=keys, values=values)
        blind = [row for row in range(5) if row not in seeing]
        found = attend(spoiled, hint)
        assert torch.equal(found[blind], clean[blind]), token
        assert not torch.isfinite(found[seeing]).any(), token
        assert torch.equal(found.isnan(), attend(spoiled, None).isnan()), token


def test_a_broken_hint_is_refused() -> None:
    case, hint = shared("one row")
    for broken in (
        replace(hint, tokens=hint.tokens[:1]),
        replace(hint, members=hint.members.long()),
        replace(hint, starts=hint.starts[:1]),
    ):
        with pytest.raises(ValueError, match="shared"):
            attend(case, broken)
