"""Attention with a window, a cap of scores, slopes, sinks, and all of them, in every set: exact, blind outside of the
window, and the same bits in any chunk and crowd.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import Attention, Kernels, kernels_for
from tests.support.close import assert_close
from tests.support.paged import Paged, naive_attention, paged

ROWS = [(1, 1), (5, 5), (1, 17), (9, 33), (4, 300), (0, 9), (1, 257), (1, 531)]
OPTIONS: dict[str, dict[str, Any]] = {
    "itself": {"window": 1},
    "a page": {"window": 16},
    "inside a block": {"window": 37},
    "over a block": {"window": 270},
    "everything": {"window": 10_000},
    "softcap": {"softcap": 1.5},
    "softcap that scores reach": {"softcap": 50.0, "scale": 12.0},
    "softcap that does nothing": {"softcap": 1e4},  # unless its tanh is coarse near 0
    "slopes": {"slopes": True},
    "sinks": {"sinks": True},
    "sinks before a window": {"sinks": True, "window": 37},
    "all": {"window": 37, "softcap": 1.5, "slopes": True, "sinks": True},
}


def attention(
    heads: int, dim: int, *, slopes: bool = False, sinks: bool = False, **options: Any
) -> Attention:
    return Attention(
        **{"scale": dim**-0.5, **options},
        slopes=2.0 ** -(torch.arange(heads) * 8 / heads) if slopes else None,  # the first is 1
        sinks=torch.linspace(-2.0, 9.0, heads) if sinks else None,  # from next to nothing to nearly all
    )


@pytest.mark.parametrize(
    ("option", "heads", "kv_heads", "dim", "page_size"),
    [
        *((option, 9, 3, 64, 16 if number % 2 else 64) for number, option in enumerate(OPTIONS)),
        ("inside a block", 3, 3, 40, 48),
        ("all", 3, 3, 40, 48),
        ("all", 8, 1, 6, 32),
    ],
)
def test_options_equal_a_plain_loop(
    kernels: Kernels,
    dtype: torch.dtype,
    storage: torch.dtype | None,
    option: str,
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
) -> None:
    case = paged(
        ROWS,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        dtype=dtype,
        storage=storage,
        how=attention(heads, dim, **OPTIONS[option]),
    )
    assert_close(case.run(kernels), naive_attention(case), dtype)


# the queries' own positions lie over the end of a block of 256 for windows of some 40
COUNT, CONTEXT = 21, 568
SHAPES = [(8, 1, 64, 16), (3, 3, 6, 64)]


def windowed(
    shape: tuple[int, int, int, int], window: int, dtype: torch.dtype, storage: torch.dtype | None
) -> Paged:
    heads, kv_heads, dim, page_size = shape
    return paged(
        [(COUNT, CONTEXT), (1, 400), (3, 30)],
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=page_size,
        dtype=dtype,
        storage=storage,
        how=Attention(dim**-0.5, window=window),
    )


@pytest.mark.parametrize("window", [1, 37, 256, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_outside_of_all_windows_is_read(
    kernels: Kernels,
    dtype: torch.dtype,
    storage: torch.dtype | None,
    shape: tuple[int, int, int, int],
    window: int,
) -> None:
    case = windowed(shape, window, dtype, storage)
    clean = case.run(kernels)
    outside = range(CONTEXT - COUNT - window + 1)
    spoilt = case.spoil(kernels, 0, outside, keys=True, values=True)
    for row in range(3):
        spoilt = spoilt.forget(row)
    assert int(spoilt.page_table[0, 0]) >= case.cache.keys.shape[0]  # no such page
    assert torch.equal(spoilt.run(kernels), clean)


@pytest.mark.parametrize("window", [1, 37, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_has_left_the_window_changes_no_bit(
    kernels: Kernels,
    dtype: torch.dtype,
    storage: torch.dtype | None,
    shape: tuple[int, int, int, int],
    window: int,
) -> None:
    case = windowed(shape, window, dtype, storage)
    clean = case.run(kernels)
    for seeing in (1, 8, 20):  # the first `seeing` queries do see the last of the spoilt tokens
        last = CONTEXT - COUNT - window + seeing
        for first, keys, values in ((0, True, True), (last, True, False), (last, False, True)):
            found = case.spoil(kernels, 0, range(first, last + 1), keys=keys, values=values).run(kernels)
            blind = [n for n in range(COUNT) if n >= seeing or n + CONTEXT - COUNT < first]
            told = [n for n in range(COUNT) if n not in blind]
            assert torch.equal(found[blind], clean[blind]), seeing
            assert torch.equal(found[COUNT:], clean[COUNT:]), seeing
            assert not torch.isfinite(found[told].float()).any(), seeing


@pytest.mark.parametrize("cap", [0.5, 30.0, 1e4])
@pytest.mark.parametrize("width", [16, 37, 320])
def test_softcap_is_exact_in_any_crowd(kernels: Kernels, dtype: torch.dtype, width: int, cap: float) -> None:
    x = (torch.randn(130, width + 3) * 40).to(dtype)[:, :width]
    x[0, :3] = torch.tensor([float("inf"), float("-inf"), 0.0])
    capped = kernels.softcap(x, cap)
    assert_close(capped, cap * torch.tanh(x.double() / cap), dtype)
    assert torch.equal(capped[0, :3], torch.tensor([cap, -cap, 0.0]).to(dtype))
    if kernels.name != "reference":
        for count in (1, 2, 17):
            assert torch.equal(kernels.softcap(x[:count], cap), capped[:count])
    x[1, 5] = float("nan")
    assert kernels.softcap(x, cap).isnan().nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize("option", ["itself", "over a block", "all"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (3, 3, 40)])
def test_options_are_bit_equal_in_any_chunk_and_crowd(
    dtype: torch.dtype, cpu_storage: torch.dtype | None, heads: int, kv_heads: int, dim: int, option: str
) -> None:
    kernels = kernels_for("cpu", "cpu")
    rows = [(60, 300), (1, 290), (40, 600), (33, 40), (1, 1)]
    case = paged(
        rows,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        page_size=16,
        dtype=dtype,
        storage=cpu_storage,
        how=attention(heads, dim, **OPTIONS[option]),
    )
    together = case.run(kernels)
    for row, (count, _) in enumerate(rows):
        start = int(case.query_start[row])
        for size in (1, 7, 1000):
            for first in range(0, count, size):
                last = min(first + size, count)
                alone = case.only(row, first, last).forget(0).run(kernels)
                assert torch.equal(alone, together[start + first : start + last]), (row, size, first)


def test_a_window_that_everything_fits_in_is_none(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged(ROWS, heads=9, kv_heads=3, dim=64, page_size=64, dtype=dtype)
    plain = case.run(kernels)
    for window in (531, 532, 2**31):
        assert torch.equal(replace(case, how=replace(case.how, window=window)).run(kernels), plain)
    assert not torch.equal(replace(case, how=replace(case.how, window=530)).run(kernels), plain)


def test_a_sink_takes_nothing_or_everything(
    kernels: Kernels, dtype: torch.dtype, storage: torch.dtype | None
) -> None:
    """-infinity is none, to the bit; far above all scores it leaves zeros; and far below them it changes no bit."""
    case = paged(
        [(3, 40), (1, 531), (1, 20), (0, 9)],
        heads=3, kv_heads=1, dim=16, page_size=16, dtype=dtype, storage=storage, padding=2,
    )  # fmt: skip
    plain = case.run(kernels)
    sinks = torch.tensor([float("-inf"), 1e4, -1e4])
    found = replace(case, how=replace(case.how, sinks=sinks)).run(kernels)
    if kernels.name == "reference":  # how the library sums depends on how many there are
        assert_close(found[:, ::2], plain[:, ::2].double(), dtype)
    else:
        assert torch.equal(found[:, ::2], plain[:, ::2])
    assert torch.equal(found[:, 1], torch.zeros_like(found[:, 1]))


def test_a_failure_inside_the_window_shows(kernels: Kernels, dtype: torch.dtype) -> None:
    how = attention(4, 64, **OPTIONS["all"])
    case = paged([(6, 300), (1, 60)], heads=4, kv_heads=2, dim=64, page_size=16, dtype=dtype, how=how)
    clean = case.run(kernels)
    assert torch.isfinite(clean.float()).all()
    case.q[2] = float("nan")
    found = case.run(kernels)
    assert torch.isnan(found[2].float()).all()
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"window": 0}, "window"), ({"softcap": 0.0}, "softcap"), ({"softcap": float("nan")}, "softcap")],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Attention(0.1, **options)


@pytest.mark.parametrize("option", ["slopes", "sinks"])
@pytest.mark.parametrize("numbers", [torch.ones(3), torch.ones(4).double(), torch.ones(8)[::2]], ids=str)
def test_numbers_of_heads_of_another_kind_are_refused_before_c_reads_them(
    numbers: torch.Tensor, option: str
) -> None:
    how = replace(Attention(0.1), **{option: numbers})
    case = paged([(1, 5)], heads=4, kv_heads=2, dim=64, page_size=16, dtype=torch.float32, how=how)
    with pytest.raises(ValueError, match=option):
        case.run(kernels_for("cpu", "cpu"))
