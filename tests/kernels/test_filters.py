"""The contract of min-p, top-k and top-p in sampling: every set, against a plain implementation in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kernels import FAILED, Filters, Kernels, kernels_for
from kernels.gpu.filters import GROUP, MOST
from kernels.noise import uniforms
from tests.support.hopping import triton_kernels

NAN, INF = float("nan"), float("inf")
SLACK = 1e-5  # of the whole: what fp32 may move an edge between two tokens by
FAINT = 1e-6  # of the whole: what fp32 may move the end of a nucleus by
Filter = tuple[int, float, float]  # top_k, top_p, min_p
OFF: Filter = (0, 1.0, 0.0)
CASES: tuple[Filter, ...] = (
    (20, 0.95, 0.0),
    (0, 0.95, 0.0),
    (0, 0.5, 0.0),
    (0, 1.0, 0.05),
    (50, 1.0, 0.0),
    (1, 1.0, 0.0),
    (0, 1e-9, 0.0),
    (0, 1.0, 1.0),
    (30, 0.7, 0.2),
    (0, 0.9995, 1e-4),
    (4000, 0.999, 0.0),
    OFF,
)


def filters(cases: list[Filter] | tuple[Filter, ...]) -> Filters:
    top_k, top_p, min_p = zip(*cases, strict=True)
    return Filters(
        torch.tensor(top_k),
        torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p, dtype=torch.float64),
    )


def sample(
    kernels: Kernels, logits: Tensor, heat: Tensor, cases: list[Filter] | tuple[Filter, ...]
) -> Tensor:
    """Row i with seed i, at position 7."""
    rows = torch.arange(len(logits))
    return kernels.sample(logits, heat, rows, torch.full_like(rows, 7), filters(cases))


def noise(rows: int) -> NDArray[np.float64]:
    return uniforms(list(range(rows)), [7] * rows)


def allowed(logits: NDArray[np.float64], heat: float, case: Filter, u: float) -> set[int]:
    """What a row may draw, as the contract has it: more than one token only where u or the end of the nucleus is
    so near to an edge that rounding decides."""
    top_k, top_p, min_p = case
    top = logits.max()
    with np.errstate(divide="ignore"):
        left = np.flatnonzero((logits >= top + heat * np.log(min_p)) & (logits > -INF))
    left = left[np.lexsort((left, -logits[left]))]
    left = left[: top_k or None]
    weights = np.exp((logits - top) / heat)
    before = np.cumsum(weights[left]) - weights[left]
    found: set[int] = set()
    for share in (top_p - FAINT, top_p, top_p + FAINT) if top_p < 1.0 else (2.0,):
        size = max(1, int((before < share * weights[left].sum()).sum()))
        kept = np.sort(left[:size])
        edges = np.cumsum(weights[kept]) / weights[kept].sum()
        first, last = (np.searchsorted(edges, u + off, side="right") for off in (-SLACK, SLACK))
        found.update(kept[first : last + 1].tolist())
    return found


def assert_allowed(
    kernels: Kernels, logits: Tensor, heat: Tensor, cases: list[Filter] | tuple[Filter, ...]
) -> None:
    tokens = sample(kernels, logits, heat, cases).tolist()
    u = noise(len(tokens))
    for row, token in enumerate(tokens):
        values = logits[row].double().numpy()
        assert token in allowed(values, float(heat[row]), cases[row], float(u[row])), (row, cases[row])


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "steep"])
def test_long_rows(kernels: Kernels, dtype: torch.dtype, spread: float) -> None:
    """Flat: what the bounds leave is more than is collected."""
    logits = (randn(len(CASES), MOST + 4000) * spread).to(dtype)
    assert_allowed(kernels, logits, torch.linspace(0.5, 2.0, len(CASES)), CASES)


VALUES = st.sampled_from([-INF, -2.0, -1.5, -0.0, 0.0, 1e-30, 0.25, 1.0, 1.5])
ROWS = st.tuples(
    st.lists(VALUES, min_size=12, max_size=12).map(lambda values: [*values, 0.0]),  # ties, and one is finite
    st.sampled_from([0.25, 1.0, 1.75]),
    st.tuples(
        st.sampled_from([0, 1, 2, 5, 12, 13, 4096]),
        st.sampled_from([1.0, 1e-6, 0.3, 0.77, 0.991]),
        st.sampled_from([0.0, 0.01, 0.41, 0.93]),
    ),
)


@pytest.mark.parametrize("name", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_short_rows_with_ties(name: str) -> None:
    kernels = triton_kernels() if name == "triton" else kernels_for("cpu", name)  # type: ignore[arg-type]

    @settings(max_examples=20 if name == "triton" else 150, deadline=None)
    @given(st.lists(ROWS, min_size=1, max_size=8))
    def check(rows: list[tuple[list[float], float, Filter]]) -> None:
        values, heat, cases = zip(*rows, strict=True)
        assert_allowed(kernels, torch.tensor(values), torch.tensor(heat), cases)

    check()


@pytest.mark.parametrize("vocab", [5000, MOST + 500])
def test_of_equals_the_first_stay(kernels: Kernels, dtype: torch.dtype, vocab: int) -> None:
    """All weigh the same, so that every set has to draw the very same token."""
    cases = ((0, 0.25, 0.0), (100, 1.0, 0.0), (100, 0.5, 0.0), (4096, 0.125, 1.0), (vocab - 1, 1.0, 0.0))
    sizes = [-(-vocab // 4), 100, 50, 512, vocab - 1]
    logits = torch.full((len(cases), vocab), -1.5, dtype=dtype)
    found = sample(kernels, logits, torch.full((len(cases),), 0.7), cases)
    u = noise(len(cases))
    assert found.tolist() == [int(share * size) for share, size in zip(u, sizes, strict=True)]


def test_equals_at_the_end_of_what_stays(kernels: Kernels) -> None:
    """The largest, and the first of those behind it, in whatever group they are."""
    logits = torch.full((32, 2 * GROUP), -30.0)
    logits[:, [GROUP + 9, 7, GROUP, 5]] = torch.tensor([1.0, 0.0, -0.0, 0.0])
    cases = [(3, 1.0, 0.0), (0, 0.6, 0.0)] * 16
    found = sample(kernels, logits, torch.ones(32), cases)
    assert set(found[::2].tolist()) == {5, 7, GROUP + 9}
    assert set(found[1::2].tolist()) == {5, GROUP + 9}


def test_no_crowd_and_no_stride_changes_a_filtered_draw(kernels: Kernels, dtype: torch.dtype) -> None:
    count, vocab = len(CASES), 1003
    wide = (randn(count, vocab + 24) * 2).to(dtype)
    strided, heat = wide[:, 3 : 3 + vocab], torch.linspace(0.3, 1.6, count)
    logits, rows, asked = strided.contiguous(), torch.arange(count), filters(CASES)
    together = kernels.sample(logits, heat, rows, rows, asked)
    assert torch.equal(kernels.sample(strided, heat, rows, rows, asked), together)
    for i in (0, 3, 11):
        one = slice(i, i + 1)
        alone = kernels.sample(logits[one], heat[one], rows[one], rows[one], filters(CASES[one]))
        assert torch.equal(alone, together[one])
    order = torch.tensor([4, 1, 10, 0])
    again = kernels.sample(
        logits[order], heat[order], order, order, filters([CASES[i] for i in order.tolist()])
    )
    assert torch.equal(again, together[order])


def test_filters_that_are_off_are_none(kernels: Kernels, dtype: torch.dtype) -> None:
    """Also for rows beside filtered ones, and for greedy rows whatever they ask for."""
    vocab, rows = 5003, torch.arange(8)
    logits, heat = (randn(8, vocab) * 2).to(dtype), torch.tensor([1.0, 0.5, 2.0, 0.0, 0.0, 1.0, 0.0, 0.7])
    plain = kernels.sample(logits, heat, rows, rows)
    off = [OFF, (vocab, 1.0, 0.0), (vocab + 1, 1.0, 0.0), (5, 0.5, 0.5), OFF, OFF, (1, 1.0, 0.0), OFF]
    assert torch.equal(kernels.sample(logits, heat, rows, rows, filters(off)), plain)
    mixed = [*off[:5], (1, 1.0, 0.0), *off[6:]]
    found = kernels.sample(logits, heat, rows, rows, filters(mixed))
    assert found[5] == logits[5].argmax()
    assert torch.equal(found[rows != 5], plain[rows != 5])


def test_what_is_not_finite_fails_its_row_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    logits, heat = randn(len(CASES), 5000).to(dtype), torch.ones(len(CASES))
    clean = sample(kernels, logits, heat, CASES)
    logits[1, 4999], logits[2, 7], logits[4], logits[8, 1:] = NAN, INF, -INF, NAN
    found = sample(kernels, logits, heat, CASES)
    broken = torch.tensor([1, 2, 4, 8])
    assert (found[broken] == FAILED).all()
    fine = torch.ones(len(CASES), dtype=torch.bool).index_fill_(0, broken, False)
    assert torch.equal(found[fine], clean[fine])


def test_masked_tokens_are_never_drawn(kernels: Kernels) -> None:
    """Nor where a filter asks for more than there are."""
    logits = torch.full((12, 9000), -INF)
    logits[:, [3, 4095, 8192, 8200]] = randn(12, 4) * 0.01
    found = sample(kernels, logits, torch.ones(12), [(40, 1.0, 0.0), (40, 0.99, 0.0), (0, 0.99, 1e-300)] * 4)
    assert set(found.tolist()) <= {3, 4095, 8192, 8200}
    assert len(set(found.tolist())) > 1


def test_logits_at_the_ends_of_fp32(kernels: Kernels) -> None:
    logits = torch.full((3, 5000), -3e38)
    logits[:, [4500, 4999]] = 3e38
    found = sample(
        kernels, logits, torch.tensor([1.0, 1e-30, 100.0]), [(3, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.4, 0.5)]
    )
    assert set(found.tolist()) <= {4500, 4999}
    assert found[2] == 4500


def test_no_input_is_changed(kernels: Kernels) -> None:
    logits, heat, rows, asked = randn(3, 50), torch.ones(3), torch.arange(3), filters(CASES[:3])
    inputs = (logits, heat, rows, asked.top_k, asked.top_p, asked.min_p)
    before = [one.clone() for one in inputs]
    assert kernels.sample(logits, heat, rows, rows, asked).dtype == torch.int64
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


def test_nothing_to_sample(kernels: Kernels) -> None:
    none = torch.empty(0, dtype=torch.int64)
    empty = Filters(none, none.double(), none.double())
    assert kernels.sample(torch.empty(0, 100), torch.empty(0), none, none, empty).shape == (0,)
