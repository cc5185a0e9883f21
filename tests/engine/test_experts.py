"""A mixture of experts: the routing, the sum, and that a token's result is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.experts import Experts, MixedExperts
from engine.linear import Linear
from engine.mlp import GatedMLP, PlainMLP
from engine.model import Decoder
from engine.parameters import expert_stacks
from engine.weights import load_weights
from kernels import KernelSet, kernels_for
from kernels.reference import KERNELS
from tests.support.families import write_tiny
from tests.support.family_models import MODELS

HIDDEN, INNER, COUNT = 32, 48, 5


def mixture(
    num_per_token: int, normalised: bool, *, kernels: KernelSet = "reference"
) -> tuple[Experts, Tensor, list[Tensor]]:
    """The mixture, its router's weight, and gate_up and down of every expert in turn."""
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    router, weights, experts = weight(COUNT, HIDDEN) * 3, [], []
    for _ in range(COUNT):
        weights += [weight(2 * INNER, HIDDEN), weight(HIDDEN, INNER)]
        chosen = kernels_for("cpu", kernels)
        experts.append(GatedMLP(chosen, "silu", Linear(weights[-2], None), Linear(weights[-1], None)))
    made = Experts(Linear(router, None), tuple(experts), num_per_token=num_per_token, normalised=normalised)
    return made, router, weights


@pytest.mark.parametrize("num_per_token", [1, 2, COUNT])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("row_multiple", [1, 16])
def test_each_token_is_the_weighted_sum_of_its_experts(
    num_per_token: int, normalised: bool, row_multiple: int
) -> None:
    experts, router, weights = mixture(num_per_token, normalised)
    experts.row_multiple = row_multiple
    x = torch.randn(19, HIDDEN, generator=torch.Generator().manual_seed(4))
    found = experts(x)
    for token, result in zip(x.double(), found, strict=True):
        shares = (router.double() @ token).softmax(0)
        best = sorted(range(COUNT), key=lambda e: -float(shares[e]))[:num_per_token]
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for e in best:
            gate, up = (weights[2 * e].double() @ token).chunk(2)
            made = weights[2 * e + 1].double() @ (gate / (1 + (-gate).exp()) * up)
            total += made * shares[e] / (shares[best].sum() if normalised else 1)
        torch.testing.assert_close(result.double(), total, rtol=1e-5, atol=1e-5)


def test_equal_shares_go_to_the_lower_index() -> None:
    router = torch.zeros(COUNT, HIDDEN)
    router[3] = 1.0
    identity = Linear(torch.eye(HIDDEN), None)
    plain = PlainMLP(KERNELS, "relu", identity, identity)
    experts = Experts(Linear(router, None), (plain,) * COUNT, num_per_token=3, normalised=True)
    _, chosen = experts.routed(torch.ones(40, HIDDEN))
    assert chosen.tolist() == [[3, 0, 1]] * 40


def test_a_token_does_not_depend_on_its_crowd() -> None:
    experts, _, _ = mixture(2, True, kernels="cpu")
    experts.row_multiple = 16
    x = torch.randn(96, HIDDEN, generator=torch.Generator().manual_seed(5))
    together = experts(x)
    for first in range(0, 96, 16):
        assert torch.equal(experts(x[first : first + 16]), together[first : first + 16])
    order = torch.randperm(96, generator=torch.Generator().manual_seed(6))
    assert torch.equal(experts(x[order]), together[order])


def test_a_token_that_failed_harms_no_other() -> None:
    experts, _, _ = mixture(2, True)
    experts.row_multiple = 16
    x = torch.randn(32, HIDDEN, generator=torch.Generator().manual_seed(7))
    clean = experts(x)
    x[9] = float("nan")
    found = experts(x)
    assert found[9].isnan().all()
    others = [token for token in range(32) if token != 9]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("number", [0, 1])
def test_experts_that_are_mixed_lie_in_one_tensor_and_hold_the_same_weights(
    tmp_path: Path, architecture: str, number: int
) -> None:
    write_tiny(tmp_path, architecture, MODELS[architecture][number])
    checkpoint = Checkpoint.open(str(tmp_path))
    mixed, plain = (
        Decoder(checkpoint.config, kernels_for("cpu", name), dtype=torch.float32, device="cpu")
        for name in ("triton", "reference")
    )
    for decoder in (mixed, plain):
        load_weights(decoder, checkpoint)
    assert mixed.parameters.keys() == plain.parameters.keys()
    assert all(torch.equal(mixed.parameters[name], one) for name, one in plain.parameters.items())
    one_by_one = {name: one for name, one in plain.parameters.items() if ".experts." in name}
    stacks = expert_stacks(checkpoint.config)
    assert sorted(name for parts in stacks.values() for name in parts) == sorted(one_by_one)
    for decoder in (mixed, plain):
        decoder.prepare(16)
        assert not decoder.parameters
    assert mixed.capturable
    assert not plain.capturable
    kinds = {type(block.mlp) for block in mixed._blocks}
    assert MixedExperts in kinds
    assert Experts not in kinds
