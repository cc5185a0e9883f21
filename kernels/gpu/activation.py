"""Activations and the soft cap: one element after another, a piece of one token's row per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import Activation, GatedActivation
from kernels.gpu.tanh import tanh

BLOCK = 1024  # elements of a program: 8 for each of 128 threads


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """x fp32, by the formulas of the contract."""
    if KIND == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(KIND == "relu")
        y = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    return y


@triton.jit
def _gated(x, up, KIND: tl.constexpr):
    """x and up fp32, by the formulas of the contract."""
    if KIND == "swiglu_oai":  # NaN stays NaN
        x = tl.where(x > 7.0, 7.0, x)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        y = x / (1.0 + tl.exp(-1.702 * x)) * (up + 1.0)
    else:
        y = _activated(x, KIND) * up
    return y


@triton.jit
def act_kernel(x, up, out, stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, width] = act(x) · up; x and up have rows `stride` apart. up None: act(x)."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    y = tl.load(x + token * stride + column, mask=inside).to(tl.float32)
    if up is not None:
        y = _gated(y, tl.load(up + token * stride + column, mask=inside).to(tl.float32), KIND)
    else:
        y = _activated(y, KIND)
    tl.store(out + token * width + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def softcap_kernel(x, out, stride, width, cap, BLOCK: tl.constexpr):
    """out [T, width] = cap · tanh(x / cap)."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    y = cap * tanh(tl.load(x + token * stride + column, mask=inside).to(tl.float32) / cap)
    tl.store(out + token * width + column, y.to(out.dtype.element_ty), mask=inside)


def act(x: Tensor, activation: Activation) -> Tensor:
    return _launch(x, None, x.shape[1], activation)


def act_mul(gate_up: Tensor, activation: GatedActivation) -> Tensor:
    width = gate_up.shape[1] // 2
    return _launch(gate_up, gate_up[:, width:], width, activation)


def softcap(x: Tensor, cap: float) -> Tensor:
    tokens, width = x.shape
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if tokens:
        softcap_kernel[(tokens, triton.cdiv(width, BLOCK))](
            x, out, x.stride(0), width, float(cap), BLOCK=BLOCK
        )
    return out


def _launch(x: Tensor, up: Tensor | None, width: int, activation: GatedActivation) -> Tensor:
    tokens = x.shape[0]
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if tokens:
        grid = (tokens, triton.cdiv(width, BLOCK))
        act_kernel[grid](x, up, out, x.stride(0), width, KIND=activation, BLOCK=BLOCK)
    return out
