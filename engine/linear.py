"""Linear: one matrix product with its weight, as every part of the decoder uses it.

Owns how a weight is kept on its device, which may be an order of the library's own. Knows no layer and no name.
Weights are plain tensors, not `nn.Module`s: nothing here is trained, and the attribute machinery of modules
costs more than the small operations of a decode step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Matmul = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # `Kernels.matmul`


class Linear:
    """A product: x `[T, in]` → x · weightᵀ + bias `[T, out]`; weight `[out, in]`, bias `[out]`.

    On a CPU in bf16 the weight is kept in oneDNN's blocked order instead of the plain one, where torch can do
    that: the results are bit-equal and a product of one row takes half the time. After `compute_by` the kernels' own
    product is used instead of the library's.
    """

    __slots__ = ("_bias", "_matmul", "_packed", "_weight", "num_inputs", "num_outputs")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._bias = bias
        self._packed = _packed(weight)
        self._weight = weight if self._packed is None else None
        self._matmul: Matmul | None = None

    def compute_by(self, matmul: Matmul) -> None:
        """From now on by that product, from a weight in the plain order."""
        if self._packed is not None:
            self._weight, self._packed = self._packed.to_dense(), None
        self._matmul = matmul

    def __call__(self, x: Tensor) -> Tensor:
        if self._matmul is not None:
            assert self._weight is not None
            return self._matmul(x, self._weight, self._bias)
        if self._packed is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
            return product
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)

    @property
    def shape(self) -> tuple[int, int, bool]:
        """(outputs, inputs, whether it has a bias): products of one shape are computed alike."""
        return self.num_outputs, self.num_inputs, self._bias is not None


def _packed(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):  # a torch or a processor without it
        return None
    return packed
