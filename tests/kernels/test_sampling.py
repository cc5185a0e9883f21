"""The contract of sampling: every set, against the exact distribution of float64 and the frequencies it promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import FAILED, Kernels
from kernels.noise import uniforms

NAN, INF = float("nan"), float("inf")
SLACK = 1e-5  # of the whole: what fp32 may move an edge between two tokens by


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def sample(kernels: Kernels, logits: Tensor, *temperatures: float, seed: int = 0) -> list[int]:
    """Row i with seed `seed` + i, at position 7 + i."""
    rows = torch.arange(len(logits))
    heat = torch.tensor(temperatures * (1 if len(temperatures) > 1 else len(logits)), dtype=torch.float32)
    return kernels.sample(logits, heat, rows + seed, rows + 7).tolist()


def assert_drawn(logits: Tensor, temperature: float, u: float, token: int) -> None:
    """`u` lies in the share of the `token`, whose weight is not 0; logits `[vocab]`."""
    heat = torch.tensor(temperature, dtype=torch.float32).double()
    weights = ((logits.double() - logits.double().max()) / heat).exp()
    sums = weights.cumsum(0) / weights.sum()
    assert logits[token] > -INF
    before = float(sums[token - 1]) if token else 0.0
    assert before - SLACK <= u < float(sums[token]) + SLACK


@pytest.mark.parametrize("vocab", [1, 5, 1000, 12289, 151936])
def test_draws_follow_the_exact_distribution(kernels: Kernels, dtype: torch.dtype, vocab: int) -> None:
    temperatures = (1.0, 0.01, 0.7, 100.0, 2.0, 1.3)
    logits = (randn(6, vocab) * torch.tensor([3.0, 0.02, 1.0, 30.0, 8.0, 1e-3])[:, None]).to(dtype)
    logits[4, : vocab // 2] = -INF
    u = uniforms(list(range(6)), list(range(7, 13))).tolist()
    found = sample(kernels, logits, *temperatures)
    for row, token in enumerate(found):
        assert_drawn(logits[row], temperatures[row], u[row], token)


def test_a_temperature_of_fp64(kernels: Kernels) -> None:
    logits, rows = randn(4, 40), torch.arange(4)
    heat = torch.tensor([0.3, 1.1, 0.0, 0.7], dtype=torch.float64)
    u = uniforms(list(range(4)), list(range(4))).tolist()
    found = kernels.sample(logits, heat, rows, rows).tolist()
    assert found[2] == int(logits[2].argmax())
    for row in (0, 1, 3):
        assert_drawn(logits[row], float(heat[row]), u[row], found[row])


def test_greedy_takes_the_lowest_of_equals(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = torch.zeros(5, 9000, dtype=dtype)
    logits[1, [8999, 5000, 40, 4096]] = 1.0
    logits[2, [8999, 8500]] = 1.0
    logits[3] = -INF
    logits[3, [5003, 8300]] = -3.0
    logits[4] = torch.arange(9000.0).to(dtype)  # which bf16 cannot tell apart
    last = int((logits[4] == logits[4].max()).nonzero()[0])
    assert sample(kernels, logits, 0.0) == [0, 40, 8500, 5003, last]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite_fails_its_row_alone(
    kernels: Kernels, dtype: torch.dtype, temperature: float
) -> None:
    logits = randn(8, 5000).to(dtype)
    clean = sample(kernels, logits, temperature)
    logits[1, 4999], logits[2, 7], logits[4], logits[5, 0] = NAN, INF, -INF, NAN
    logits[5, 1], logits[6, 1:] = INF, NAN
    found = sample(kernels, logits, temperature)
    assert [found[i] for i in (1, 2, 4, 5, 6)] == [FAILED] * 5
    assert [found[i] for i in (0, 3, 7)] == [clean[i] for i in (0, 3, 7)]


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_masked_tokens_are_never_drawn(kernels: Kernels, temperature: float) -> None:
    """Of a whole block, at both ends of one, and between those that remain."""
    allowed = [3, 4095, 8192, 8200, 12287]
    logits = torch.full((12, 13000), -INF)
    logits[:, allowed] = randn(12, len(allowed)) * 0.01
    logits[11, allowed[1:]] = -INF
    found = sample(kernels, logits, temperature, seed=40)
    assert set(found) <= set(allowed)
    assert len(set(found)) > 1
    assert found[11] == 3


@pytest.mark.parametrize("vocab", [5, 1003, 9001])
def test_no_crowd_and_no_stride_changes_a_draw(kernels: Kernels, dtype: torch.dtype, vocab: int) -> None:
    count = 7
    wide = (randn(count, vocab + 24) * 2).to(dtype)
    strided = wide[:, 3 : 3 + vocab]
    logits, rows = strided.contiguous(), torch.arange(count)
    heat = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.3, 1.0])
    together = kernels.sample(logits, heat, rows + 90, rows)
    assert torch.equal(kernels.sample(strided, heat, rows + 90, rows), together)
    for i in (0, 3, 6):
        one = slice(i, i + 1)
        for alone in (logits[one], strided[one], logits[one].clone()):
            assert torch.equal(kernels.sample(alone, heat[one], rows[one] + 90, rows[one]), together[one])
    order = torch.tensor([4, 1, 6, 0])
    again = kernels.sample(logits[order], heat[order], rows[order] + 90, rows[order])
    assert torch.equal(again, together[order])
    order = torch.arange(0, count, 2)
    again = kernels.sample(strided[::2], heat[order], order + 90, order)
    assert torch.equal(again, together[order])


def test_no_input_is_changed(kernels: Kernels) -> None:
    inputs = (randn(3, 50), torch.tensor([0.0, 1.0, 2.0]), torch.arange(3), torch.arange(3))
    before = [one.clone() for one in inputs]
    assert kernels.sample(*inputs).dtype == torch.int64
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


def test_nothing_to_sample(kernels: Kernels, dtype: torch.dtype) -> None:
    none = torch.empty(0, dtype=torch.int64)
    found = kernels.sample(torch.empty(0, 100, dtype=dtype), torch.empty(0), none, none)
    assert found.shape == (0,)
    assert found.dtype == torch.int64


def test_float16(kernels: Kernels) -> None:
    logits = torch.tensor([[1.0, 65504.0, 65504.0], [-65504.0, -65504.0, -INF], [0.0, INF, 0.0]]).half()
    assert sample(kernels, logits, 0.0, 1.0, 1.0)[0] == 1
    assert sample(kernels, logits, 0.0, 1.0, 1.0)[1] in (0, 1)
    assert sample(kernels, logits, 0.0, 1.0, 1.0)[2] == FAILED


def test_logits_at_the_ends_of_fp32(kernels: Kernels) -> None:
    """Whose differences overflow, in one block and between two, and no temperature divides to NaN."""
    logits = torch.full((3, 5000), -3e38)
    logits[:, 4500] = 3e38
    logits[1, 4999] = 3e38
    found = sample(kernels, logits, 1.0, 1e-30, 100.0)
    assert found[0] == found[2] == 4500
    assert found[1] in (4500, 4999)


def test_frequencies(kernels: Kernels) -> None:
    interpreted = kernels.name == "triton" and not torch.cuda.is_available()
    draws, temperature = 2_000 if interpreted else 20_000, 0.8
    shares = torch.tensor([0.4, 0.3, 0.0, 0.15, 0.08, 0.04, 0.03])
    logits, rows = (shares.log() * temperature).expand(draws, -1), torch.arange(draws)
    heat = torch.full((draws,), temperature)
    counts = kernels.sample(logits.contiguous(), heat, rows // 10, rows % 10).bincount(minlength=7).double()
    assert counts[2] == 0
    expected, seen = shares.double() * draws, shares > 0
    chi_square = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    assert math.isfinite(chi_square)
    assert chi_square < 26  # 5 degrees of freedom: beyond 1e-4


@pytest.mark.parametrize("vocab", [1, 3, 8, 1023, 1024, 1025, 5003])
def test_greedy_rows_of_any_width(kernels: Kernels, dtype: torch.dtype, vocab: int) -> None:
    """The largest logit in any place, the lowest of equals; NaN and infinity in any place fail their row alone."""
    places = sorted(
        {0, 1 % vocab, 7 % vocab, 8 % vocab, vocab // 2, vocab - 2, vocab - 1} & set(range(vocab))
    )
    rows = (-1 - randn(3 * len(places) + 2, vocab, seed=vocab).abs()).to(dtype)
    wanted = []
    for i, place in enumerate(places):
        rows[i, place:] = 0.0
        rows[i, place + 1 :: 2] = -0.0
        rows[len(places) + i, place] = NAN
        rows[2 * len(places) + i, place] = INF
        wanted.append(place)
    rows[-1] = -INF
    wanted += [FAILED] * (2 * len(places)) + [int(rows[-2].argmax()), FAILED]
    assert sample(kernels, rows, 0.0) == wanted
    wide = torch.cat([rows, rows.flip(1)], dim=1)
    assert sample(kernels, wide[:, :vocab], 0.0) == wanted


def test_greedy_rows_among_others(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = randn(6, 500, seed=3).to(dtype)
    heat = [0.0, 1.0, 0.0, 0.0, 0.7, 0.0]
    together = sample(kernels, logits, *heat)
    for i, one in enumerate(heat):
        rows = torch.tensor([i])
        assert (
            kernels.sample(logits[i : i + 1], torch.tensor([one]), rows, rows + 7).tolist()
            == together[i : i + 1]
        )
