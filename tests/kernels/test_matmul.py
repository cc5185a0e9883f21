"""The contract of a set's own products: near to float64, and every row its own, among any others, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels import Kernels, kernels_for
from kernels.gpu.matmul import tiled
from kernels.gpu.matmul_tiles import MOST_SEGMENTS, segments_for, tile_for, tiles_for
from tests.support.close import assert_close
from tests.support.hopping import triton_kernels

SHAPES = [(37, 100), (64, 64), (256, 96), (1024, 128), (1031, 72)]  # inputs, outputs
EVERY_SHAPE = pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


@pytest.fixture(params=["cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Of the sets that have products of their own."""
    return triton_kernels() if request.param == "triton" else kernels_for("cpu", "cpu")


def product(kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """By a packed weight, if the set packs any."""
    assert kernels.matmul is not None
    if kernels.name == "cpu" and x.dtype == torch.float16:
        pytest.skip("the cpu set has no fp16")
    return kernels.matmul(x, weight if kernels.pack is None else kernels.pack(weight), bias)


def operands(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a view of a wider matrix, then weight and bias."""
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randn(tokens, inputs + 8, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    return x.to(dtype)[:, :inputs], weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)


def test_the_reference_has_none() -> None:
    assert kernels_for("cpu", "reference").matmul is None


@EVERY_SHAPE
@EVERY_DTYPE
@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 300])
def test_products(kernels: Kernels, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> None:
    x, weight, bias = operands(tokens, inputs, outputs, dtype)
    exact = x.double() @ weight.double().T
    assert_close(product(kernels, x, weight), exact, dtype)
    assert_close(product(kernels, x, weight, bias), exact + bias.double(), dtype)


@EVERY_SHAPE
@EVERY_DTYPE
def test_a_row_does_not_depend_on_how_many_there_are(
    kernels: Kernels, dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    x, weight, bias = operands(257, inputs, outputs, dtype)
    whole = product(kernels, x, weight, bias)
    for count in (1, 2, 3, 4, 5, 17, 64, 65, 128, 200):
        assert torch.equal(product(kernels, x[:count], weight, bias), whole[:count]), count
        assert torch.equal(product(kernels, x[-count:], weight, bias), whole[-count:]), count


@EVERY_DTYPE
@pytest.mark.parametrize(("inputs", "outputs"), [(37, 100), (1024, 128)])
@pytest.mark.parametrize("tokens", [7, 130])
def test_what_is_not_finite_stays_in_its_row(
    kernels: Kernels, dtype: torch.dtype, tokens: int, inputs: int, outputs: int
) -> None:
    x, weight, _ = operands(tokens, inputs, outputs, dtype)
    clean = product(kernels, x, weight)
    x[3, inputs - 1], x[5] = float("nan"), float("inf")
    found = product(kernels, x, weight)
    assert found[3].isnan().all()
    assert not found[5].isfinite().any()
    others = [row for row in range(tokens) if row not in (3, 5)]
    assert torch.equal(found[others], clean[others])


def test_no_tokens_are_no_work(kernels: Kernels) -> None:
    """Also as the first product of a thread, which has no memory of its own for it yet."""
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(product, kernels, torch.ones(0, 32), torch.ones(48, 32)).result()
    assert found.shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 3, 29, 211])
def test_the_cpu_takes_wide_inputs_in_parts(dtype: torch.dtype, tokens: int) -> None:
    """5,000 inputs are several parts of a panel, and 211 tokens several blocks."""
    kernels = kernels_for("cpu", "cpu")
    x, weight, bias = operands(tokens, 5_000, 83, dtype)
    found = product(kernels, x, weight, bias)
    assert_close(found, x.double() @ weight.double().T + bias.double(), dtype)
    alone = torch.cat([product(kernels, row[None], weight, bias) for row in x])
    assert torch.equal(alone, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    kernels = kernels_for("cpu", "cpu")
    assert kernels.quantise_int8 is not None
    assert kernels.int8_matmul is not None
    x, weight, bias = operands(257, 1031, 500, dtype)
    integers = kernels.quantise_int8(weight)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((product(kernels, x, weight, bias), kernels.int8_matmul(x, integers, bias)))
    finally:
        torch.set_num_threads(before)
    for plain, rounded in found[1:]:
        assert torch.equal(plain, found[0][0])
        assert torch.equal(rounded, found[0][1])


def test_a_plain_weight_is_as_good_as_a_packed_one() -> None:
    kernels = kernels_for("cpu", "cpu")
    x, weight, bias = operands(9, 100, 50, torch.bfloat16)
    assert kernels.matmul is not None
    assert torch.equal(kernels.matmul(x, weight, bias), product(kernels, x, weight, bias))


def test_an_operand_that_does_not_fit_is_refused() -> None:
    kernels = kernels_for("cpu", "cpu")
    x, weight, bias = operands(9, 100, 50, torch.float32)
    for wrong in ((x[:, :99], weight, bias), (x, weight, bias[:49]), (x.bfloat16(), weight, bias)):
        with pytest.raises(ValueError, match="contract broken, matmul"):
            product(kernels, *wrong)
    with pytest.raises(ValueError, match="contract broken, pack"):
        product(kernels, x, weight.half(), bias)


@EVERY_DTYPE
@pytest.mark.parametrize("inputs", [1024, 2112])
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_no_way_to_cut_a_product_changes_a_bit(
    kernels: Kernels, dtype: torch.dtype, inputs: int, tokens: int
) -> None:
    """All tiles of a table, segments together and apart: what `matmul` chooses from, by the number of tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, weight, bias = (value.to(device) for value in operands(tokens, inputs, 100, dtype))
    assert segments_for(inputs, 100) > 1
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else (9, 0)
    tiles = tiles_for(capability, dtype)
    expected = tiled(x, weight, bias, tiles.few, apart=False)
    for tile in {tiles.few, tiles.many, tiles.wide}:
        for apart in (False, True):
            assert torch.equal(tiled(x, weight, bias, tile, apart=apart), expected), (tile, apart)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@EVERY_DTYPE
def test_tiles_sum_in_one_order(capability: tuple[int, int], dtype: torch.dtype) -> None:
    tiles = tiles_for(capability, dtype)
    every = [tiles.few, tiles.many, tiles.wide]
    assert len({tile.depth for tile in every}) == 1
    if dtype != torch.float32:  # on sm_90 tiles of fewer rows or warps take instructions of another kind
        assert all(tile.rows >= 64 and tile.warps >= 4 for tile in every)
    assert tile_for(tiles, 64, 1024, 1024) == tiles.few
    assert tile_for(tiles, 65, 1024, 1024) == tiles.many
    assert tile_for(tiles, 65, 1024, 151936) == tiles.wide
    assert tile_for(tiles, 4096, 1000, 151936) == tiles.few


def test_segments_are_long_and_as_many_as_there_is_use_for() -> None:
    assert segments_for(1024, 151936) == segments_for(1024, 6144) == segments_for(500, 64) == 1
    assert segments_for(1024, 4096) == 2
    assert segments_for(3072, 1024) == 4
    assert segments_for(100_000, 64) == MOST_SEGMENTS
