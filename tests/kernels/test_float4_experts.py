"""Experts of 4 bits: each bit as the format says, and products whose bits are those of the weights made plain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import Kernels
from kernels.gpu.architectures import capability
from kernels.gpu.grouped_matmul import grouped_in_tiles, grouped_matmul
from kernels.gpu.matmul_tiles import tiles_for
from kernels.weights import Float4Weight
from tests.kernels.test_mixture import DEVICE, inputs, mixed, mixture_of
from tests.support.hopping import triton_kernels

EDGES = (0, 1, 2, 100, 127, 128, 129, 200, 252, 253, 254, 255)  # scales
HALF = torch.float16


@pytest.fixture(params=["triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The one set that has it, named as in other files: few of its cases are quick (`conftest`)."""
    return triton_kernels()


def e2m1(bits: int) -> float:
    """Sign, two bits of exponent with a bias of 1, one of mantissa."""
    sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
    value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -value if sign else value


def stored(
    experts: int, outputs: int, blocks: int, *, low: int = 121, high: int = 127
) -> tuple[Tensor, Tensor]:
    """Blocks and scales as files have them, the scales from `low` until `high`."""
    generator = torch.Generator().manual_seed(experts + outputs + blocks)
    shape = (experts, outputs, blocks)
    floats = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return floats, torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def weight_of(blocks: Tensor, scales: Tensor, device: torch.device = DEVICE) -> Float4Weight:
    experts, outputs, number = scales.shape
    weight = Float4Weight.empty(experts, outputs, 32 * number, device=device)
    weight.put(blocks, scales)
    return weight


def bits(values: Tensor) -> Tensor:
    """For comparisons: the bits, and one for all NaNs."""
    kind = {4: torch.int32, 2: torch.int16}[values.element_size()]
    return torch.where(values.isnan(), torch.full_like(values, float("nan")), values).view(kind)


def test_a_weight_is_its_float_times_the_power_of_its_block() -> None:
    blocks, scales = stored(2, 3, 4, low=0, high=255)
    scales[1, 2, 3] = 255
    weight = weight_of(blocks, scales, torch.device("cpu"))
    assert weight.shape == (2, 3, 128)
    assert weight.num_bytes == 2 * 3 * 128 * 17 // 32
    found = weight.dequantised()
    assert found.dtype == torch.float32
    for expert in range(2):
        for output in range(3):
            for place in range(128):
                byte = int(blocks[expert, output, place // 32, place % 32 // 2])
                half = byte >> 4 if place % 2 else byte & 15
                scale = int(scales[expert, output, place // 32])
                if scale == 255:
                    assert found[expert, output, place].isnan()
                else:
                    wanted = torch.tensor(e2m1(half) * 2.0 ** (scale - 127), dtype=torch.float64).float()
                    assert torch.equal(bits(found[expert, output, place]), bits(wanted))


def test_experts_of_a_weight_are_a_view() -> None:
    weight = weight_of(*stored(4, 6, 2))
    some = weight.experts(1, 3)
    assert torch.equal(some.dequantised(), weight.dequantised()[1:3])
    some.words.zero_()
    assert not weight.dequantised()[1:3].any()


def test_inputs_are_whole_blocks() -> None:
    with pytest.raises(ValueError, match="48 inputs"):
        Float4Weight.empty(2, 8, 48, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, HALF], ids=["bf16", "fp32", "fp16"])
def test_every_byte_and_the_scales_at_both_ends(kernels: Kernels, dtype: torch.dtype) -> None:
    """Of a product with rows of which one input is 1: the weights themselves, or NaN beside one that is infinite. One
    expert for each scale; what a weight is rounded to is that of its fp32 value. The last row is of ones, the last
    output too, whose sums are infinite or NaN."""
    every = torch.cat((torch.arange(256), torch.full((16,), 0x22))).to(torch.uint8)
    blocks = every.view(1, 17, 1, 16).repeat(len(EDGES), 1, 1, 1)
    scales = torch.tensor(EDGES, dtype=torch.uint8)[:, None, None].repeat(1, 17, 1)
    weight = weight_of(blocks, scales)
    x = torch.cat((torch.eye(32), torch.ones(1, 32))).to(DEVICE, dtype)
    starts = 33 * torch.arange(len(EDGES) + 1, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(33, dtype=torch.int32, device=DEVICE).repeat(len(EDGES))
    plain = weight.dequantised().to(dtype)
    found = grouped_matmul(x, weight, None, rows, starts)
    assert torch.equal(bits(found), bits(grouped_matmul(x, plain, None, rows, starts)))
    assert found[-34].isinf().tolist() == [False] * 16 + [True]  # of scale 254
    assert found[-1].isnan().all()
    for number, scale in enumerate(EDGES):
        made = found[33 * number :][:32].t()
        if plain[number].isfinite().all():
            assert torch.equal(made, plain[number])
        else:
            assert scale >= 253 or dtype == HALF
            assert made.isnan().any()


SHAPES = [  # rows of each group, outputs, inputs
    ((3, 0, 90, 1), 72, 96),  # no tile of 64 inputs divides them
    ((0, 5, 0), 200, 192),
    ((70, 0, 64), 130, 320),
    ((1, 1, 0, 2), 576, 288),  # gpt-oss's, of a tenth
]


@pytest.mark.parametrize(("counts", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_the_bits_are_those_of_the_plain_weights_in_every_tile(
    kernels: Kernels, dtype: torch.dtype, counts: tuple[int, ...], outputs: int, inputs: int, biased: bool
) -> None:
    weight = weight_of(*stored(len(counts), outputs, inputs // 32))
    plain, rows = weight.dequantised().to(dtype), sum(counts)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows + 3, inputs + 16, generator=generator).to(DEVICE, dtype)[:, :inputs]
    sources = torch.randint(rows + 3, (rows,), generator=generator).to(DEVICE, torch.int32)
    bias = torch.randn(len(counts), outputs, generator=generator).to(DEVICE, dtype) if biased else None
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0).to(torch.int32)
    x[int(sources[0])] = float("nan")
    wanted = grouped_matmul(x, plain, bias, sources, starts)
    assert wanted.isnan().any(dim=1).sum() == (sources == sources[0]).sum()
    tiles = tiles_for(capability(DEVICE), dtype)
    for tile in dict.fromkeys((tiles.few, tiles.many, tiles.wide)):
        found = grouped_in_tiles(x, weight, bias, sources, starts, tile)
        assert torch.equal(bits(found), bits(wanted)), tile
    assert torch.equal(bits(grouped_matmul(x, weight, bias, sources, starts)), bits(wanted))


MIXTURES = [  # tokens, hidden, inner, experts, of which each takes
    (33, 96, 64, 6, 4),
    (12, 288, 288, 4, 2),
    (17, 64, 160, 5, 1),
]


@pytest.mark.parametrize(("tokens", "hidden", "inner", "experts", "num_per_token"), MIXTURES)
def test_a_mixture_has_the_bits_of_the_plain_weights(
    kernels: Kernels,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    num_per_token: int,
) -> None:
    """With biases, gates that are clamped, a token that is NaN and one whose logits are; both or one in 4 bits."""
    gate_up = weight_of(*stored(experts, 2 * inner, hidden // 32), torch.device("cpu"))
    down = weight_of(*stored(experts, hidden, inner // 32), torch.device("cpu"))
    plain = replace(
        mixture_of(hidden, inner, experts, num_per_token, dtype, like_gpt_oss=True),
        gate_up=gate_up.dequantised().to(dtype),
        down=down.dequantised().to(dtype),
    )
    x, logits = inputs(tokens, hidden, experts, dtype)
    x[1], logits[2] = float("nan"), float("nan")
    wanted = mixed(kernels, x, logits, plain)
    assert wanted.isnan().any(dim=1).tolist() == [row in (1, 2) for row in range(tokens)]
    for quantised in (replace(plain, gate_up=gate_up, down=down), replace(plain, down=down)):
        assert torch.equal(bits(mixed(kernels, x, logits, quantised)), bits(wanted))


def test_the_sets_that_keep_them_mix_them(kernels: Kernels) -> None:
    assert Float4Weight in kernels.keeps
    assert kernels.mix_experts is not None
