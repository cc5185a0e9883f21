"""The contract of normalisers: every set, against the logs of a softmax in float64, row by row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import Kernels, Normalisers

NAN, INF = float("nan"), float("inf")


def randn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def logprobs(logits: Tensor, of: Normalisers) -> Tensor:
    assert of.largest.dtype == of.log_sums.dtype == torch.float32
    assert of.largest.shape == of.log_sums.shape == logits.shape[:1]
    return logits.float() - of.largest[:, None] - of.log_sums[:, None]


@pytest.mark.parametrize("vocab", [1, 5, 1000, 12289, 151936])
def test_logits_become_the_logs_of_their_softmax(kernels: Kernels, dtype: torch.dtype, vocab: int) -> None:
    logits = (randn(4, vocab) * torch.tensor([4.0, 1e-3, 30.0, 1.0])[:, None] + 10.0).to(dtype)
    logits[3, : vocab // 2] = -INF
    found = logprobs(logits, kernels.normalisers(logits)).double()
    torch.testing.assert_close(found, logits.double().log_softmax(dim=1), rtol=1e-6, atol=5e-5)


def test_a_token_that_is_nearly_certain(kernels: Kernels) -> None:
    """Whose logprob is not rounded as its logit is."""
    logits = torch.full((2, 5000), 4096.0)
    logits[0, 4999], logits[1, 3] = 4108.0, 4110.0
    found, exact = logprobs(logits, kernels.normalisers(logits)), logits.double().log_softmax(dim=1)
    for row, token in ((0, 4999), (1, 3)):
        assert float(found[row, token]) == pytest.approx(float(exact[row, token]), rel=2e-3)


def test_what_is_not_finite_spoils_its_row_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    logits = randn(6, 5000).to(dtype)
    clean = logprobs(logits, kernels.normalisers(logits))
    logits[1, 4999], logits[2, 7], logits[4] = NAN, INF, -INF
    found = logprobs(logits, kernels.normalisers(logits))
    assert not found[[1, 2, 4]].isfinite().any()
    assert torch.equal(found[[0, 3, 5]], clean[[0, 3, 5]])


@pytest.mark.parametrize("vocab", [5, 1003, 9001])
def test_no_crowd_and_no_stride_changes_a_bit(kernels: Kernels, dtype: torch.dtype, vocab: int) -> None:
    strided = (randn(5, vocab + 24) * 3).to(dtype)[:, 3 : 3 + vocab]
    logits = strided.contiguous()
    together = torch.stack(kernels.normalisers(logits))
    assert torch.equal(torch.stack(kernels.normalisers(strided)), together)
    for i in (0, 3, 4):
        for alone in (logits[i : i + 1], strided[i : i + 1], logits[i : i + 1].clone()):
            assert torch.equal(torch.stack(kernels.normalisers(alone)), together[:, i : i + 1])


def test_no_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    assert logprobs(
        torch.empty(0, 40, dtype=dtype), kernels.normalisers(torch.empty(0, 40, dtype=dtype))
    ).shape == (0, 40)
