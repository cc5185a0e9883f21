"""Experts of 8 bits: products of groups have the bits of products one by one, whatever the groups are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import Kernels
from kernels.gpu.activation import act_mul
from kernels.gpu.fp8_matmul import SOME, fp8_tiled, quantise_rows
from kernels.gpu.grouped_fp8 import grouped_fp8_matmul
from kernels.mixture import Mixture
from kernels.weights import BLOCK, Float8Experts, Float8Weight
from tests.kernels.test_mixture import DEVICE, inputs, mixed
from tests.support.grouped import assert_each_is_as_alone
from tests.support.hopping import triton_kernels

SHAPES = [  # rows of each group, outputs, inputs
    ((3, 0, 70, 1), 72, 96),
    ((0, 5, 0), 200, 320),
    ((1, 1, 0, 66), 264, 128),
]


@pytest.fixture(params=["triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The one set that has it, named as in other files: few of its cases are quick (`conftest`)."""
    return triton_kernels()


def weight_of(experts: int, outputs: int, width: int, blocks: bool) -> Float8Experts:
    generator = torch.Generator().manual_seed(experts + outputs + width)
    weight = Float8Experts.empty(experts, outputs, width, blocks=blocks, device=DEVICE)
    weight.floats.copy_(torch.randn(experts, outputs, width, generator=generator) * 40)
    weight.scales.copy_((torch.rand(weight.scales.shape, generator=generator) + 0.5) * width**-0.5 / 40)
    return weight


def alone(x: Tensor, weight: Float8Weight, bias: Tensor | None) -> Tensor:
    """In the tile of groups, not cut into segments."""
    floats, scales = quantise_rows(x, BLOCK if weight.blocks else x.shape[1])
    return fp8_tiled(floats, scales, weight, bias, x.dtype, SOME, 1)


@pytest.mark.parametrize(("counts", "outputs", "width"), SHAPES)
@pytest.mark.parametrize("blocks", [False, True], ids=["channels", "blocks"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_bits_are_those_of_each_product_alone(
    kernels: Kernels,
    dtype: torch.dtype,
    counts: tuple[int, ...],
    outputs: int,
    width: int,
    blocks: bool,
    biased: bool,
) -> None:
    weight = weight_of(len(counts), outputs, width, blocks)
    assert_each_is_as_alone(grouped_fp8_matmul, alone, weight, counts, dtype, DEVICE, biased=biased)


@pytest.mark.parametrize("blocks", [False, True], ids=["channels", "blocks"])
def test_a_token_is_the_weighted_sum_of_its_experts(kernels: Kernels, blocks: bool) -> None:
    """Each of which is what the products of 8 bits make alone, with what lies between them."""
    tokens, hidden, inner, experts = 9, 160, 128, 5
    gate_up, down = (
        weight_of(experts, 2 * inner, hidden, blocks),
        weight_of(experts, hidden, inner, blocks),
    )
    mixture = Mixture(gate_up=gate_up, down=down, activation="silu", num_per_token=2, normalised=True)
    x, logits = (part.to(DEVICE) for part in inputs(tokens, hidden, experts, torch.float32))
    found = mixed(kernels, x, logits, mixture)
    shares, chosen = logits.softmax(dim=-1).topk(2, dim=-1)
    shares /= shares.sum(dim=-1, keepdim=True)
    wanted = torch.zeros_like(x)
    for token in range(tokens):
        for share, expert in zip(shares[token], chosen[token].tolist(), strict=True):
            between = act_mul(alone(x[token : token + 1], gate_up.expert(expert), None), "silu")
            wanted[token] += share * alone(between, down.expert(expert), None)[0]
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert found.abs().max() > 0.1


def test_experts_of_a_weight_are_a_view() -> None:
    weight = weight_of(4, 130, 200, True)
    some = weight.experts(1, 3)
    assert (some.shape, some.blocks, some.num_bytes) == ((2, 130, 200), True, 2 * (130 * 200 + 4 * 2 * 2))
    some.floats.zero_()
    assert not weight.expert(2).dequantised().any()
    assert weight.expert(3).dequantised().any()
