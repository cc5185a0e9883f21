"""QuantisedLinear: a product with a weight that stays quantised on its device.

Owns which operation of the kernels multiplies with it. Knows no layer, no name and no checkpoint (`kept_weights`).
"""

from __future__ import annotations

from torch import Tensor

from engine.linear import Linear, Matmul
from kernels import Kernels
from kernels.weights import Int4Weight, QuantisedWeight


class QuantisedLinear(Linear):
    """A product: x `[T, in]` → x · weightᵀ + bias `[T, out]`; bias `[out]`. Parts that were merged by rows are one
    weight. How a row is rounded may depend on T until `compute_by`."""

    __slots__ = ("_invariant", "_kernels", "_quantised")

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None, kernels: Kernels) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._bias = bias
        self._quantised = weight
        self._kernels = kernels
        self._invariant = False

    def compute_by(self, matmul: Matmul) -> None:
        """From now on in a way in which a row's bits depend on that row alone. `matmul` is for plain weights."""
        self._invariant = True

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._quantised
        if isinstance(weight, Int4Weight):
            return self._kernels.int4_matmul(x, weight, self._bias, invariant=self._invariant)
        return self._kernels.fp8_matmul(x, weight, self._bias, invariant=self._invariant)
