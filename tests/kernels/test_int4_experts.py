"""Experts of 4-bit integers: products of groups have the bits of products one by one, whatever the groups are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import Kernels
from kernels.gpu.grouped_int4 import grouped_int4_matmul
from kernels.gpu.int4_matmul import FP32, MANY, int4_tiled
from kernels.weights import Int4Experts, Int4Weight
from tests.kernels.test_mixture import DEVICE
from tests.support.grouped import assert_each_is_as_alone
from tests.support.hopping import triton_kernels

SHAPES = [  # rows of each group, outputs, inputs of a group and in all
    ((3, 0, 40, 1), 72, 32, 128),
    ((0, 5, 0), 200, 128, 384),
    ((1, 1, 0, 34), 136, 256, 256),
]


@pytest.fixture(params=["triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The one set that has it, named as in other files: few of its cases are quick (`conftest`)."""
    return triton_kernels()


def weight_of(experts: int, outputs: int, inputs: int, group_size: int, scale: torch.dtype) -> Int4Experts:
    generator = torch.Generator().manual_seed(experts + outputs + inputs)
    weight = Int4Experts.empty(experts, outputs, inputs, group_size, scale=scale, device=DEVICE)
    for number in range(experts):
        one, groups = weight.expert(number), inputs // group_size
        one.put(torch.randint(16, (inputs, outputs), generator=generator).to(DEVICE))
        zeros = torch.randint(17, (groups, outputs), generator=generator)
        scales = (torch.rand(groups, outputs, generator=generator) + 0.5) * inputs**-0.5 / 8
        one.put_groups(zeros.to(DEVICE), scales.to(DEVICE))
    return weight


def alone(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """In the tile of groups. These weights are too small to be cut into segments."""
    return int4_tiled(x, weight, bias, FP32 if x.dtype == torch.float32 else MANY)


@pytest.mark.parametrize(("counts", "outputs", "group_size", "width"), SHAPES)
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_bits_are_those_of_each_product_alone(
    kernels: Kernels,
    dtype: torch.dtype,
    counts: tuple[int, ...],
    outputs: int,
    group_size: int,
    width: int,
    scale: torch.dtype,
    biased: bool,
) -> None:
    weight = weight_of(len(counts), outputs, width, group_size, scale)
    assert_each_is_as_alone(grouped_int4_matmul, alone, weight, counts, dtype, DEVICE, biased=biased)


def test_experts_of_a_weight_are_a_view() -> None:
    weight = weight_of(4, 24, 256, 64, torch.bfloat16)
    some = weight.experts(1, 3)
    assert (some.shape, some.num_bytes) == ((2, 24, 256), 2 * 24 * (128 + 4 * 4))
    assert torch.equal(some.expert(1).dequantised(), weight.expert(2).dequantised())
    some.groups.zero_()
    assert not weight.expert(2).dequantised().any()
    assert weight.expert(3).dequantised().any()


def test_inputs_are_whole_blocks() -> None:
    with pytest.raises(ValueError, match="96 inputs in groups of 32"):
        Int4Experts.empty(2, 8, 96, 32, scale=torch.float16, device="cpu")
