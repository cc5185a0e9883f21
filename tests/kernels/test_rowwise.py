"""The contract of layer norm and of the activations: every set, every dtype, against float64."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from kernels import Activation, GatedActivation, Kernels, kernels_for
from tests.support.close import assert_close

EVERY_ACTIVATION = pytest.mark.parametrize("activation", get_args(Activation))
EVERY_GATE = pytest.mark.parametrize("gate", [*get_args(Activation), "swiglu_oai"])


def exact(x: Tensor, activation: Activation) -> Tensor:
    """The formulas of the contract, in float64."""
    x = x.double()
    if activation == "silu":
        return x / (1 + (-x).exp())
    if activation == "gelu":
        return x * torch.special.erfc(-x / math.sqrt(2)) / 2
    if activation == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x.clamp_min(0)


def exactly_gated(x: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
    if activation != "swiglu_oai":
        return exact(x, activation) * up.double()
    x, up = x.double().clamp(max=7), up.double().clamp(-7, 7)
    return x / (1 + (-1.702 * x).exp()) * (up + 1)


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("width", [16, 24, 576, 1001])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norms(kernels: Kernels, dtype: torch.dtype, tokens: int, width: int, biased: bool) -> None:
    x = (torch.randn(tokens, width + 5) + 3).to(dtype)[:, :width]
    residual, weight = torch.randn(tokens, width).to(dtype), torch.randn(width).to(dtype)
    bias = torch.randn(width).to(dtype) if biased else None

    def norm(x: Tensor) -> Tensor:
        centred = x.double() - x.double().mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight.double()
        return scaled if bias is None else scaled + bias.double()

    assert_close(kernels.layer_norm(x, weight, bias, 1e-3), norm(x), dtype)
    total = (x.float() + residual.float()).to(dtype)
    normed, new_residual = kernels.add_layer_norm(x, residual, weight, bias, 1e-3)
    assert torch.equal(new_residual, total)
    assert_close(normed, norm(total), dtype)


def test_layer_norm_of_values_far_from_zero_stays_exact(kernels: Kernels) -> None:
    """A variance as mean(x²) - mean(x)² would be lost in fp32."""
    x = torch.randn(4, 100) + 1000
    centred = x.double() - x.double().mean(1, keepdim=True)
    wanted = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    found = kernels.layer_norm(x, torch.ones(100), None, 1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


@EVERY_GATE
@pytest.mark.parametrize("inner", [16, 24, 1536, 37])
def test_activations(kernels: Kernels, dtype: torch.dtype, gate: GatedActivation, inner: int) -> None:
    gate_up = (torch.randn(5, 2 * inner + 3) * 8).to(dtype)[:, : 2 * inner]
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -88.0])
    x, up = gate_up.chunk(2, dim=1)
    assert_close(kernels.act_mul(gate_up, gate), exactly_gated(x, up, gate), dtype)
    if gate != "swiglu_oai":
        assert_close(kernels.act(x, gate), exact(x, gate), dtype)


def test_a_clamped_gate_is_exact_everywhere(kernels: Kernels) -> None:
    x = torch.cat((torch.linspace(-15, 15, 30_001), torch.tensor([-1e30, -1e10, 1e10, 1e30, 7.0, -7.0])))
    for up in (x, x.flip(0), torch.full_like(x, -1.5)):
        found = kernels.act_mul(torch.cat((x, up))[None], "swiglu_oai")[0]
        wanted = exactly_gated(x, up, "swiglu_oai")
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)


@EVERY_ACTIVATION
def test_activations_are_exact_everywhere(kernels: Kernels, activation: Activation) -> None:
    x = torch.cat((torch.linspace(-15, 15, 30_001), torch.tensor([-1e30, -1e10, 1e10, 1e30])))[None]
    wanted = exact(x, activation)
    torch.testing.assert_close(kernels.act(x, activation).double(), wanted, rtol=1e-6, atol=1e-6)


@EVERY_GATE
def test_they_do_not_depend_on_the_row_count_or_the_threads(
    dtype: torch.dtype, gate: GatedActivation
) -> None:
    activation: Activation = "silu" if gate == "swiglu_oai" else gate
    kernels = kernels_for("cpu", "cpu")
    x, weight, bias = torch.randn(200, 576).to(dtype), torch.randn(576).to(dtype), torch.randn(576).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        normed = kernels.layer_norm(x, weight, bias, 1e-5)
        plain, gated = kernels.act(x, activation), kernels.act_mul(x, gate)
        torch.set_num_threads(1)
        for count in (1, 2, 17, 200):
            assert torch.equal(kernels.layer_norm(x[:count], weight, bias, 1e-5), normed[:count])
            assert torch.equal(kernels.act(x[:count], activation), plain[:count])
            assert torch.equal(kernels.act_mul(x[:count], gate), gated[:count])
    finally:
        torch.set_num_threads(before)


@EVERY_GATE
def test_nothing_to_do_and_nan(kernels: Kernels, dtype: torch.dtype, gate: GatedActivation) -> None:
    activation: Activation = "silu" if gate == "swiglu_oai" else gate
    x, weight = torch.randn(2, 64).to(dtype), torch.ones(64, dtype=dtype)
    assert kernels.act(x[:0], activation).shape == kernels.layer_norm(x[:0], weight, weight, 1e-5).shape
    assert kernels.act_mul(x[:0], gate).shape == (0, 32)
    x[1, 3] = float("nan")
    plain, gated = kernels.act(x, activation), kernels.act_mul(x, gate)
    for out in (plain, gated):
        assert out.isnan().nonzero().tolist() == [[1, 3]]
    x[1, 3], x[1, 40] = 1.0, float("nan")
    assert kernels.act_mul(x, gate).isnan().nonzero().tolist() == [[1, 8]]
    normed = kernels.layer_norm(x, weight, weight, 1e-5)
    assert normed[0].isfinite().all()
    assert normed[1].isnan().all()
