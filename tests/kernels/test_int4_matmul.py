"""Products with weights of 4 bits: near to float64, whatever the group, and in all ways to cut them."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from kernels import Kernels
from kernels.gpu.int4_matmul import FEW, FP32, MANY, MOST_TOKENS, int4_plain, int4_tiled
from kernels.gpu.quantised_tiles import LEAST_BLOCKS, MOST_SEGMENTS, segments_for
from kernels.weights import Int4Weight
from tests.support.close import assert_close

SHAPES = [(128, 100, 32), (256, 72, 128), (256, 40, 256), (1024, 136, 64)]  # inputs, outputs, group
EVERY_SHAPE = pytest.mark.parametrize(("inputs", "outputs", "group_size"), SHAPES)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weight_of(
    inputs: int, outputs: int, group_size: int, *, scale: torch.dtype = torch.float16, ordered: bool = False
) -> Int4Weight:
    generator = torch.Generator().manual_seed(inputs + outputs)
    weight = Int4Weight.empty(outputs, inputs, group_size, scale=scale, device="cpu", ordered=ordered)
    weight.put(torch.randint(0, 16, (inputs, outputs), generator=generator))
    zeros = torch.randint(0, 17, weight.groups.shape, generator=generator)
    weight.put_groups(zeros, (torch.rand(weight.groups.shape, generator=generator) + 0.1) * inputs**-0.5 / 8)
    if weight.order is not None:
        weight.order.copy_(torch.randperm(inputs, generator=generator))
    return weight


def operands(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, a view of a wider matrix, and a bias."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, inputs + 16, generator=generator).to(dtype)[:, :inputs]
    return x, torch.randn(outputs, generator=generator).to(dtype)


@EVERY_SHAPE
@pytest.mark.parametrize("tokens", [1, 5, 33, MOST_TOKENS + 1])
def test_products(
    kernels: Kernels, dtype: torch.dtype, tokens: int, inputs: int, outputs: int, group_size: int
) -> None:
    weight = weight_of(inputs, outputs, group_size)
    x, bias = operands(tokens, inputs, outputs, dtype)
    exact = x.double() @ weight.dequantised().double().T
    for invariant in (False, True):
        assert_close(kernels.int4_matmul(x, weight, None, invariant=invariant), exact, dtype)
    assert_close(kernels.int4_matmul(x, weight, bias), exact + bias.double(), dtype)


@pytest.mark.parametrize("tokens", [3, MOST_TOKENS + 1])
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_products_of_inputs_in_another_order(
    kernels: Kernels, dtype: torch.dtype, tokens: int, scale: torch.dtype
) -> None:
    weight = weight_of(256, 40, 64, scale=scale, ordered=True)
    x, bias = operands(tokens, 256, 40, dtype)
    exact = x.double() @ weight.dequantised().double().T + bias.double()
    assert_close(kernels.int4_matmul(x, weight, bias), exact, dtype)


def test_a_row_of_an_invariant_product_does_not_depend_on_how_many_there_are(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    weight = weight_of(1024, 40, 128)
    x, bias = operands(40, 1024, 40, dtype)
    whole = kernels.int4_matmul(x, weight, bias, invariant=True)
    for count in (1, 17, 33):
        assert torch.equal(kernels.int4_matmul(x[:count], weight, bias, invariant=True), whole[:count]), count


def test_no_tokens_are_no_work(kernels: Kernels) -> None:
    assert kernels.int4_matmul(torch.ones(0, 128), weight_of(128, 48, 128), None).shape == (0, 48)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_segments_together_and_apart_are_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(2048, 100, 128)
    x, bias = operands(20, 2048, 100, dtype)
    assert segments_for(2048 // 128, 100) > 1
    weight = Int4Weight(weight.words.to(DEVICE), weight.groups.to(DEVICE), weight.scale)
    x, bias = x.to(DEVICE), bias.to(DEVICE)
    apart = int4_tiled(x, weight, bias, MANY)
    # the package has its function under that name
    module = importlib.import_module("kernels.gpu.int4_matmul")
    monkeypatch.setattr(module, "APART_TOKENS", 0)
    assert torch.equal(int4_tiled(x, weight, bias, MANY), apart)


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("group_size", [16, 128])
def test_a_weight_made_plain_is_rounded_once(scale: torch.dtype, group_size: int) -> None:
    weight = weight_of(256, 24, group_size, scale=scale)
    there = Int4Weight(weight.words.to(DEVICE), weight.groups.to(DEVICE), scale)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(int4_plain(there, dtype).cpu(), weight.dequantised().t().to(dtype))


def test_rows_of_a_weight_are_a_weight() -> None:
    weight = weight_of(256, 40, 64)
    assert torch.equal(weight.rows(8, 24).dequantised(), weight.dequantised()[8:24])


def test_what_fits() -> None:
    assert all(Int4Weight.fits(1024, size) for size in (16, 32, 64, 128, 256, 1024))
    assert not any(Int4Weight.fits(1024, size) for size in (0, 8, 48, 96, 192, 384))
    assert not Int4Weight.fits(960, 64)
    with pytest.raises(ValueError, match="960"):
        Int4Weight.empty(8, 960, 64, scale=torch.float16, device="cpu")


def test_segments_are_long_and_tiles_are_few() -> None:
    assert segments_for(32, 24576) == 2
    assert segments_for(32, 4096) == 32 // LEAST_BLOCKS
    assert segments_for(1000, 64) == MOST_SEGMENTS
    assert segments_for(2, 64) == 1
    assert {FEW.warps, MANY.warps, FP32.warps} == {4}
