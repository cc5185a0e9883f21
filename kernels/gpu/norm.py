"""Norms, with the addition of the residual in front of them: whole rows in registers, read once.

A program takes as many rows as fill a block, because the rows of head norms are short. How the values of a row are
summed depends on the width alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a program, unless one row is longer


@triton.jit
def inverse_rms(values, width, eps):
    """1 / sqrt(mean(values²) + eps) [ROWS, 1] of values [ROWS, BLOCK_W] fp32, which are 0 beyond `width`."""
    return tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / width + eps)


@triton.jit(do_not_specialize=["tokens"])
def norm_kernel(
    x, residual, weight, bias, out, x_stride, residual_stride, tokens, width, eps, offset,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out [tokens, width] contiguous. residual None: x is normed. Otherwise residual becomes x + residual, rounded,
    and is normed. CENTRED: layer norm, else RMS norm. bias None: there is none."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_W)[None, :]
    inside = (row < tokens) & (column < width)
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_W]
    if residual is not None:
        place = residual + row * residual_stride + column
        total = (values + tl.load(place, mask=inside, other=0.0).to(tl.float32)).to(out.dtype.element_ty)
        tl.store(place, total, mask=inside)
        values = total.to(tl.float32)
    if CENTRED:
        mean = tl.sum(values, axis=1, keep_dims=True) / width
        values = tl.where(column < width, values - mean, 0.0)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    normed = values * inverse_rms(values, width, eps) * gain
    if bias is not None:
        normed += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return _launch(x, None, weight, None, eps, offset, centred=False)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, None, eps, offset, centred=False), residual


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, weight, bias, eps, 0.0, centred=True)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, bias, eps, 0.0, centred=True), residual


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    offset: float,
    *,
    centred: bool,
) -> Tensor:
    tokens, width = x.shape
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    block = triton.next_power_of_2(width)
    rows = max(1, BLOCK // block)
    norm_kernel[(triton.cdiv(tokens, rows),)](
        x, residual, weight, bias, out, x.stride(0), 0 if residual is None else residual.stride(0),
        tokens, width, float(eps), float(offset),
        CENTRED=centred, ROWS=rows, BLOCK_W=block, num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return out
