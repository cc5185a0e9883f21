"""Products of 8-bit integers: the sets agree bit for bit, and with what the contract says in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import Kernels, kernels_for
from kernels.weights import Int8Weight, rounded_to_int8

EVERY_SHAPE = pytest.mark.parametrize(("inputs", "outputs"), [(7, 3), (101, 37), (576, 96), (5_000, 83)])
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Of the sets that have such products."""
    return kernels_for("cpu", request.param)


def quantised(kernels: Kernels, weight: Tensor) -> Int8Weight:
    assert kernels.quantise_int8 is not None
    return kernels.quantise_int8(weight)


def product(kernels: Kernels, x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    assert kernels.int8_matmul is not None
    return kernels.int8_matmul(x, weight, bias)


def operands(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a view of a wider matrix with a row of zeros, then weight and bias."""
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randn(tokens, inputs + 8, generator=generator)
    x[tokens // 2] = 0.0
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    weight[outputs // 2] = 0.0
    return x.to(dtype)[:, :inputs], weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)


@EVERY_SHAPE
@EVERY_DTYPE
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 29, 211])
def test_products(kernels: Kernels, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> None:
    """One rounding of a scale, one of the sum and one to the dtype are all that may differ from the exact result."""
    x, weight, bias = operands(tokens, inputs, outputs, dtype)
    integers, scales = rounded_to_int8(weight)
    rounded, steps = rounded_to_int8(x)
    assert integers.abs().amax() == 127
    exact = (rounded.double() @ integers.double().T) * (steps.double()[:, None] * scales.double())
    found = product(kernels, x, quantised(kernels, weight), bias)
    torch.testing.assert_close(
        found.double(), exact + bias.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5
    )
    assert torch.equal(found[tokens // 2], bias)
    plain = product(kernels, x, quantised(kernels, weight))
    assert (plain[:, outputs // 2] == 0.0).all()


@EVERY_SHAPE
@EVERY_DTYPE
def test_the_sets_agree_bit_for_bit(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    x, weight, bias = operands(67, inputs, outputs, dtype)
    expected, found = (
        product(kernels, x, quantised(kernels, weight), bias)
        for kernels in (kernels_for("cpu", "reference"), kernels_for("cpu", "cpu"))
    )
    assert torch.equal(expected, found)


def test_an_integer_in_the_middle_is_rounded_to_even(kernels: Kernels) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    weight = quantised(kernels, torch.eye(7) * 127.0)
    assert product(kernels, x, weight).tolist() == [[127.0 * 127.0, 0, 254.0, 254.0, 0, -254.0, -254.0]]


@EVERY_DTYPE
def test_a_row_does_not_depend_on_how_many_there_are(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight, bias = operands(257, 101, 37, dtype)
    held = quantised(kernels, weight)
    whole = product(kernels, x, held, bias)
    for count in (1, 2, 3, 4, 5, 17, 64, 200):
        assert torch.equal(product(kernels, x[:count], held, bias), whole[:count]), count
        assert torch.equal(product(kernels, x[-count:], held, bias), whole[-count:]), count


@EVERY_DTYPE
@pytest.mark.parametrize("tokens", [6, 130])
def test_what_is_not_finite_stays_in_its_row(kernels: Kernels, dtype: torch.dtype, tokens: int) -> None:
    x, weight, _ = operands(tokens, 101, 37, dtype)
    held = quantised(kernels, weight)
    clean = product(kernels, x, held)
    x[4, 100], x[5, 0] = float("nan"), float("-inf")
    found = product(kernels, x, held)
    assert found[4].isnan().all()
    assert found[5].isnan().all()
    others = [row for row in range(tokens) if row not in (4, 5)]
    assert torch.equal(found[others], clean[others])


def test_no_tokens_are_no_work(kernels: Kernels) -> None:
    assert product(kernels, torch.ones(0, 32), quantised(kernels, torch.ones(48, 32))).shape == (0, 48)


def test_an_operand_that_does_not_fit_is_refused() -> None:
    kernels = kernels_for("cpu", "cpu")
    x, weight, bias = operands(9, 100, 50, torch.float32)
    held = quantised(kernels, weight)
    for wrong in ((x[:, :99], held, bias), (x, held, bias[:49]), (x.half(), held, None)):
        with pytest.raises(ValueError, match="contract broken, int8_matmul"):
            product(kernels, *wrong)
