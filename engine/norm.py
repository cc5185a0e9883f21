"""The norms of a decoder: one value per norm, with its weight.

Owns the choice of the kernel. Knows no place in a block: a block asks for x, or for residual + x, normed.
"""

from __future__ import annotations

from torch import Tensor

from kernels import HeadNorms, Kernels


class RMSNorm:
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019); weight `[width]`, to which `offset` is
    added."""

    __slots__ = ("_eps", "_kernels", "_offset", "_weight", "_width")

    def __init__(self, kernels: Kernels, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        self._kernels = kernels
        self._weight = weight
        self._width = weight.shape[0]
        self._eps = eps
        self._offset = offset

    @property
    def weight(self) -> Tensor:
        """`[width]`."""
        return self._weight

    @property
    def eps_and_offset(self) -> tuple[float, float]:
        return self._eps, self._offset

    def __call__(self, x: Tensor) -> Tensor:
        """x `[T, width]`, normed."""
        return self._kernels.rms_norm(x, self._weight, self._eps, self._offset)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual + x, normed; residual + x), each `[T, width]`. May overwrite `residual`."""
        return self._kernels.add_rms_norm(x, residual, self._weight, self._eps, self._offset)

    def of_heads(self, x: Tensor) -> Tensor:
        """Heads `[T, h, d]` normed over as many channels as there are weights: one head's or all."""
        return self(x.reshape(-1, self._width)).view(x.shape)


def head_norms(q_norm: RMSNorm, k_norm: RMSNorm, head_dim: int) -> HeadNorms | None:
    """Both as one value; None where they norm all heads as one, or differ in more than their weights."""
    q, k = q_norm.weight, k_norm.weight
    if q_norm.eps_and_offset != k_norm.eps_and_offset or not q.shape[0] == k.shape[0] == head_dim:
        return None
    return HeadNorms(q, k, *q_norm.eps_and_offset)


class LayerNorm:
    """Layer norm over the last dimension (Ba et al. 2016); weight and bias `[width]`."""

    __slots__ = ("_bias", "_eps", "_kernels", "_weight")

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self._kernels = kernels
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """x `[T, width]`, normed."""
        return self._kernels.layer_norm(x, self._weight, self._bias, self._eps)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual + x, normed; residual + x), each `[T, width]`. May overwrite `residual`."""
        return self._kernels.add_layer_norm(x, residual, self._weight, self._bias, self._eps)


Norm = RMSNorm | LayerNorm


def added(norm: Norm | None, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(residual + x, normed where there is a norm; residual + x), each `[T, hidden]`. x None: nothing to add."""
    if norm is None:
        total = residual if x is None else x + residual
        return total, total
    if x is None:
        return norm(residual), residual
    return norm.added(x, residual)
