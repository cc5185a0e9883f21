"""RMS norms and rotation in every set, and what the contract says of all operations: empty inputs do nothing, and NaN
is carried. Attention, storing and the others have suites of their own.

The yardstick is float64 on the same (rounded) inputs.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import Kernels, kernels_for
from kernels.reference import KERNELS as REFERENCE
from tests.support.close import assert_close
from tests.support.paged import laid_out, paged


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("width", [16, 24, 576, 1001])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(kernels: Kernels, dtype: torch.dtype, tokens: int, width: int, offset: float) -> None:
    x, residual = torch.randn(tokens, width + 5).to(dtype)[:, :width], torch.randn(tokens, width).to(dtype)
    weight = torch.randn(width).to(dtype)

    def norm(x: Tensor) -> Tensor:
        wide = x.double()
        return wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)

    assert_close(kernels.rms_norm(x, weight, 1e-5, offset), norm(x), dtype)
    total = (x.float() + residual.float()).to(dtype)
    normed, new_residual = kernels.add_rms_norm(x, residual, weight, 1e-5, offset)
    assert torch.equal(new_residual, total)
    assert_close(normed, norm(total), dtype)


@pytest.mark.parametrize("dim", [64, 80, 32, 40, 6])
def test_rope_rotates_views_in_place(kernels: Kernels, dtype: torch.dtype, dim: int) -> None:
    wide = torch.randn(11, 9, dim).to(dtype)
    angles = torch.rand(11, dim // 2) * 6
    wanted = wide.clone()
    for head in range(6):  # as complex numbers: channel i with channel i + d/2
        pairs = torch.complex(*wide[:, head].double().chunk(2, dim=1))
        turned = pairs * torch.polar(torch.ones_like(angles.double()), angles.double())
        wanted[:, head] = torch.cat((turned.real, turned.imag), dim=1).to(dtype)
    kernels.rope(wide[:, :4], wide[:, 4:6], angles.cos(), angles.sin())
    assert_close(wide, wanted, dtype)
    assert torch.equal(wide[:, 6:], wanted[:, 6:])


@pytest.mark.parametrize(("dim", "rotated"), [(64, 48), (40, 16), (16, 2), (128, 96)])
def test_rope_rotates_the_first_channels_and_leaves_the_others(
    kernels: Kernels, dtype: torch.dtype, dim: int, rotated: int
) -> None:
    wide = torch.randn(33, 8, dim).to(dtype)  # q, k and v in one
    before = wide.clone()
    angles = torch.rand(33, rotated // 2) * 6
    kernels.rope(wide[:, :4, :rotated], wide[:, 4:6, :rotated], angles.cos(), angles.sin())
    expected = before[:, :6, :rotated].contiguous()
    kernels.rope(expected[:, :4], expected[:, 4:6], angles.cos(), angles.sin())
    assert torch.equal(wide[:, :6, :rotated], expected)
    assert not torch.equal(expected, before[:, :6, :rotated])
    assert torch.equal(wide[:, :6, rotated:], before[:, :6, rotated:])
    assert torch.equal(wide[:, 6:], before[:, 6:])


def test_norms_do_not_depend_on_the_row_count(dtype: torch.dtype) -> None:
    kernels = kernels_for("cpu", "cpu")
    x, weight = torch.randn(200, 576).to(dtype), torch.randn(576).to(dtype)
    normed = kernels.rms_norm(x, weight, 1e-5)
    for count in (1, 2, 17, 130):
        assert torch.equal(kernels.rms_norm(x[:count], weight, 1e-5), normed[:count])


def test_nothing_to_do(kernels: Kernels, dtype: torch.dtype) -> None:
    case = paged([], heads=4, kv_heads=2, dim=64, page_size=16, dtype=dtype)
    assert case.run(kernels).shape == (0, 4, 64)
    empty = torch.empty(0, 64, dtype=dtype)
    assert kernels.rms_norm(empty, torch.ones(64, dtype=dtype), 1e-5).shape == (0, 64)
    heads = torch.empty(0, 2, 64, dtype=dtype)
    angles = torch.empty(0, 32)
    kernels.rope(heads, heads, angles, angles)
    kernels.store_kv(heads, heads, laid_out(case.cache, kernels), torch.empty(0, dtype=torch.int64))


def test_nan_is_carried_not_hidden(kernels: Kernels, dtype: torch.dtype) -> None:
    x = torch.randn(2, 64).to(dtype)
    x[1, 3] = float("nan")
    weight = torch.ones(64, dtype=dtype)
    out = kernels.rms_norm(x, weight, 1e-5)
    assert torch.isfinite(out[0].float()).all()
    assert torch.isnan(out[1].float()).any()


def test_reference_serves_float16() -> None:
    chosen = kernels_for("cpu", "auto", dtype=torch.float16)
    assert chosen is REFERENCE
    x = torch.randn(3, 64).half()
    assert math.isclose(
        float(chosen.rms_norm(x, torch.ones(64).half(), 1e-5).float().square().mean()), 1, rel_tol=0.01
    )
