"""Linear: one matrix product with its weight, as every part of the decoder uses it.

Owns how a weight is kept on its device, which may be an order of the library's own. Knows no layer and no name.
Weights are plain tensors, not `nn.Module`s: nothing here is trained, and the attribute machinery of modules
costs more than the small operations of a decode step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Kernels, Matmul
from kernels.blocks import Product
from kernels.weights import PackedWeight


class Linear:
    """A product: x `[T, in]` → x · weightᵀ + bias `[T, out]`; weight `[out, in]`, bias `[out]`.

    By the library, unless the kernels say that their own product is the better one for the dtype, or `compute_by` has
    asked for it. On a CPU in bf16 the library's weight is kept in oneDNN's blocked order instead of the plain one,
    where torch can do that: the results are bit-equal and a product of one row takes half the time.
    """

    __slots__ = ("_bias", "_blocked", "_matmul", "_weight", "num_inputs", "num_outputs")

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels | None = None) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._bias = bias
        self._weight: Tensor | PackedWeight | None = weight
        self._blocked: Tensor | None = None  # the weight in oneDNN's order
        self._matmul: Matmul | None = None
        if kernels is not None and weight.dtype in kernels.multiplies:
            self.compute_by(kernels)
        else:
            self._blocked = _blocked(weight)
            if self._blocked is not None:
                self._weight = None  # a view, however small, would keep its memory

    def compute_by(self, kernels: Kernels) -> None:
        """From now on multiply by the product of those kernels, which must have one."""
        if self._blocked is not None:
            self._weight, self._blocked = self._blocked.to_dense(), None
        if kernels.pack is not None and isinstance(self._weight, Tensor):
            self._weight = kernels.pack(self._weight)
        self._matmul = kernels.matmul

    @property
    def packed(self) -> Product | None:
        """Weight and bias, where a set of kernels keeps the weight in its own order; else None."""
        return Product(self._weight, self._bias) if isinstance(self._weight, PackedWeight) else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._matmul is not None:
            assert self._weight is not None
            return self._matmul(x, self._weight, self._bias)
        if self._blocked is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocked, self._bias, "none", [], "")
            return product
        assert isinstance(self._weight, Tensor)
        return F.linear(x, self._weight, self._bias)

    @property
    def shape(self) -> tuple[int, int, bool]:
        """(outputs, inputs, whether it has a bias): products of one shape are computed alike."""
        return self.num_outputs, self.num_inputs, self._bias is not None


def _blocked(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    try:
        blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        torch.ops.mkldnn._linear_pointwise(
            weight.new_zeros(1, weight.shape[1]), blocked, None, "none", [], ""
        )
    except (AttributeError, RuntimeError, NotImplementedError):  # a torch or a processor without it
        return None
    return blocked
