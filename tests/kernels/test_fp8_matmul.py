"""Products with weights of 8 bits: those of the reference, in which x is rounded as the contract says; rows alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import Kernels, kernels_for
from kernels.weights import Float8Weight
from tests.support.close import assert_close

REFERENCE = kernels_for("cpu", "reference")
SHAPES = [(64, 48), (200, 136), (1024, 96)]  # inputs, outputs


def operands(tokens: int, inputs: int, outputs: int, blocks: bool) -> tuple[Tensor, Float8Weight, Tensor]:
    """x in fp32, a view of a wider matrix, and a bias."""
    generator = torch.Generator().manual_seed(tokens + inputs)
    weight = Float8Weight.empty(outputs, inputs, blocks=blocks, device="cpu")
    weight.floats.copy_(torch.randn(outputs, inputs, generator=generator) * 40)
    weight.scales.copy_((torch.rand(weight.scales.shape, generator=generator) + 0.5) * inputs**-0.5 / 40)
    x = torch.randn(tokens, inputs + 16, generator=generator)[:, :inputs]
    return x, weight, torch.randn(outputs, generator=generator)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("blocks", [False, True], ids=["channels", "blocks"])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_products(
    kernels: Kernels, dtype: torch.dtype, tokens: int, blocks: bool, inputs: int, outputs: int
) -> None:
    x, weight, bias = operands(tokens, inputs, outputs, blocks)
    x, bias = x.to(dtype), bias.to(dtype)
    expected = REFERENCE.fp8_matmul(x.float(), weight, bias.float())
    if kernels.name == "triton" and torch.cuda.is_available():
        dtype = torch.bfloat16  # as near as the tensor cores' sums are
    for invariant in (False, True):
        assert_close(kernels.fp8_matmul(x, weight, bias, invariant=invariant), expected, dtype)


@pytest.mark.parametrize("blocks", [False, True], ids=["channels", "blocks"])
def test_the_reference_is_near_to_the_product_without_rounding(blocks: bool) -> None:
    x, weight, bias = operands(9, 256, 72, blocks)
    exact = x @ weight.dequantised().t() + bias
    found = REFERENCE.fp8_matmul(x, weight, bias)
    assert (found - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


@pytest.mark.parametrize("blocks", [False, True], ids=["channels", "blocks"])
def test_what_is_not_finite_stays_in_its_row_and_zeros_are_zeros(kernels: Kernels, blocks: bool) -> None:
    x, weight, _ = operands(6, 200, 24, blocks)
    x[0] = 0
    clean = kernels.fp8_matmul(x, weight, None)
    assert not clean[0].any()
    x[3, 199], x[4, 5] = float("nan"), float("inf")
    found = kernels.fp8_matmul(x, weight, None)
    assert found[3:5].isnan().all()
    others = [0, 1, 2, 5]
    assert torch.equal(found[others], clean[others])


def test_a_row_of_an_invariant_product_does_not_depend_on_how_many_there_are(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    x, weight, bias = operands(34, 256, 24, True)
    x, bias = x.to(dtype), bias.to(dtype)
    whole = kernels.fp8_matmul(x, weight, bias, invariant=True)
    for count in (1, 33):
        assert torch.equal(kernels.fp8_matmul(x[:count], weight, bias, invariant=True), whole[:count]), count


def test_no_tokens_are_no_work(kernels: Kernels) -> None:
    _, weight, _ = operands(1, 64, 48, False)
    assert kernels.fp8_matmul(torch.ones(0, 64), weight, None).shape == (0, 48)


def test_rows_of_a_weight_are_a_weight() -> None:
    for blocks in (False, True):
        _, weight, _ = operands(1, 200, 300, blocks)
        assert torch.equal(weight.rows(128, 300).dequantised(), weight.dequantised()[128:300])
