"""A mixture of experts as one operation: near to float64, whoever chooses whom, and every row by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import Kernels
from kernels.gpu.architectures import capability
from kernels.gpu.grouped_matmul import grouped_in_tiles
from kernels.gpu.matmul_tiles import tiles_for
from kernels.gpu.routing import grouped, route
from kernels.mixture import Mixture
from tests.support.close import assert_close
from tests.support.hopping import triton_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [  # tokens, hidden, inner, experts, of which each takes
    (1, 64, 48, 4, 2),
    (19, 32, 40, 5, 1),
    (70, 72, 36, 8, 3),
    (5, 64, 24, 70, 8),  # most experts have no token
    (150, 64, 64, 2, 2),  # an expert has more rows than a tile
]


@pytest.fixture(params=["triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The one set that has it, named as in other files: few of its cases are quick (`conftest`)."""
    return triton_kernels()


def mixture_of(
    hidden: int,
    inner: int,
    experts: int,
    num_per_token: int,
    dtype: torch.dtype,
    *,
    normalised: bool = True,
    like_gpt_oss: bool = False,
) -> Mixture:
    generator = torch.Generator().manual_seed(hidden + inner)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    return Mixture(
        gate_up=weight(experts, 2 * inner, hidden),
        down=weight(experts, hidden, inner),
        gate_up_bias=weight(experts, 2 * inner) * inner**0.5 if like_gpt_oss else None,
        down_bias=weight(experts, hidden) * hidden**0.5 if like_gpt_oss else None,
        activation="swiglu_oai" if like_gpt_oss else "silu",
        num_per_token=num_per_token,
        normalised=normalised,
    )


def inputs(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and logits, views of wider matrices."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden + 16, generator=generator).to(dtype)[:, :hidden]
    logits = (2 * torch.randn(tokens, experts + 3, generator=generator)).to(dtype)[:, :experts]
    return x, logits


def exactly(x: Tensor, logits: Tensor, mixture: Mixture) -> Tensor:
    """In float64, token by token."""
    found = torch.zeros(x.shape, dtype=torch.float64)
    for token, choices in enumerate(logits.double().softmax(dim=-1)):
        best = sorted(range(len(choices)), key=lambda e: (-float(choices[e]), e))[: mixture.num_per_token]
        total = choices[best].sum() if mixture.normalised else 1.0
        for expert in best:
            gate_up = mixture.gate_up[expert].double() @ x[token].double()
            if mixture.gate_up_bias is not None:
                gate_up += mixture.gate_up_bias[expert].double()
            gate, up = gate_up.chunk(2)
            if mixture.activation == "swiglu_oai":
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1.0
            sharp = 1.702 if mixture.activation == "swiglu_oai" else 1.0
            made = mixture.down[expert].double() @ (gate / (1 + (-sharp * gate).exp()) * up)
            if mixture.down_bias is not None:
                made += mixture.down_bias[expert].double()
            found[token] += made * choices[expert] / total
    return found


def mixed(kernels: Kernels, x: Tensor, logits: Tensor, mixture: Mixture) -> Tensor:
    assert kernels.mix_experts is not None
    return kernels.mix_experts(x, logits, mixture)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("tokens", "hidden", "inner", "experts", "num_per_token"), SHAPES)
def test_a_token_is_the_weighted_sum_of_its_experts(
    kernels: Kernels,
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    num_per_token: int,
    normalised: bool,
) -> None:
    mixture = mixture_of(hidden, inner, experts, num_per_token, dtype, normalised=normalised)
    x, logits = inputs(tokens, hidden, experts, dtype)
    found = mixed(kernels, x, logits, mixture)
    # three roundings to the dtype before the last one
    assert_close(found / 2, exactly(x, logits, mixture) / 2, dtype)


def test_experts_with_biases_and_clamped_gates(kernels: Kernels, dtype: torch.dtype) -> None:
    """As gpt-oss has them: the softmax over the chosen alone is the shares of all, divided by their sum."""
    mixture = mixture_of(72, 36, 6, 4, dtype, like_gpt_oss=True)
    x, logits = inputs(33, 72, 6, dtype)
    x = 6 * x  # so that gates and ups reach their limits
    found = mixed(kernels, x, logits, mixture)
    exact = exactly(x, logits, mixture)
    assert_close(found / 8, exact / 8, dtype)  # of numbers up to 56, rounded three times
    best = logits.double().topk(4, dim=-1)
    shares = torch.zeros(33, 6, dtype=torch.float64).scatter_(1, best.indices, best.values.softmax(dim=-1))
    assert torch.allclose(exactly(x, shares.log(), mixture), exact)


def test_no_tokens_are_no_work(kernels: Kernels) -> None:
    x, logits = inputs(0, 64, 4, torch.bfloat16)
    assert mixed(kernels, x, logits, mixture_of(64, 48, 4, 2, torch.bfloat16)).shape == (0, 64)


def test_a_row_does_not_depend_on_its_crowd(kernels: Kernels, dtype: torch.dtype) -> None:
    mixture = mixture_of(32, 20, 2, 1, dtype)
    x, logits = inputs(140, 32, 2, dtype)  # which tiles of few rows do not do
    together = mixed(kernels, x, logits, mixture)
    order = torch.randperm(140, generator=torch.Generator().manual_seed(6))
    for rows in (slice(0, 1), slice(7, 40), order):
        assert torch.equal(mixed(kernels, x[rows], logits[rows], mixture), together[rows])


def test_what_is_not_finite_fails_its_row_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    mixture = mixture_of(64, 40, 4, 2, dtype)
    x, logits = inputs(30, 64, 4, dtype)
    clean = mixed(kernels, x, logits, mixture)
    x, logits = x.clone(), logits.clone()
    x[3], logits[3] = float("nan"), float("nan")
    logits[9, 2] = float("inf")
    logits[20, 1] = float("nan")
    logits[25, 0] = float("-inf")  # which only says that it is not to be taken
    found = mixed(kernels, x, logits, mixture)
    failed = torch.tensor([3, 9, 20])
    assert found[failed].isnan().all()
    assert found[25].isfinite().all()
    others = [token for token in range(30) if token not in (3, 9, 20, 25)]
    assert torch.equal(found[others], clean[others])


def test_equal_shares_go_to_the_lower_index(dtype: torch.dtype) -> None:
    logits = torch.zeros(40, 5, dtype=dtype, device=DEVICE)
    logits[:, 3] = 1.0
    chosen, shares = route(logits, 3, normalised=True)
    assert chosen.tolist() == [[3, 0, 1]] * 40
    assert torch.allclose(shares.sum(dim=-1), torch.ones(40, device=DEVICE))


@pytest.mark.parametrize(
    ("tokens", "num_per_token", "experts"), [(1, 1, 1), (7, 3, 10), (700, 2, 9), (2100, 4, 5)]
)
def test_entries_lie_side_by_side_in_their_own_order(tokens: int, num_per_token: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, experts, generator=generator).argsort(dim=-1)[:, :num_per_token].int()
    starts, places, sources = (one.cpu() for one in grouped(chosen.to(DEVICE), experts))
    order = chosen.flatten().argsort(stable=True)
    assert torch.equal(places.flatten()[order], torch.arange(order.numel(), dtype=torch.int32))
    assert torch.equal(sources, (order // num_per_token).int())
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    assert starts.tolist() == [0, *counts.cumsum(0).tolist()]


def test_no_tile_changes_a_bit(dtype: torch.dtype) -> None:
    tiles = tiles_for(capability(DEVICE), dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(90, 128, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(3, 72, 128, generator=generator).to(DEVICE, dtype)
    starts = torch.tensor([0, 80, 80, 90], dtype=torch.int32, device=DEVICE)
    bias = torch.randn(3, 72, generator=generator).to(DEVICE, dtype)
    found = [
        grouped_in_tiles(x, weight, bias, None, starts, tile) for tile in (tiles.few, tiles.many, tiles.wide)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert_close(
        found[0][:80].cpu(),
        x[:80].cpu().double() @ weight[0].cpu().double().T + bias[0].cpu().double(),
        dtype,
    )
