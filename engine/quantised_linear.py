"""QuantisedLinear and Int8Linear: products with weights that are quantised on their device.

Owns which operation of the kernels multiplies with them: with one that stays as its checkpoint stores it, and with
one that is rounded when it is loaded. Knows no layer, no name and no checkpoint (`kept_weights`).
"""

from __future__ import annotations

from torch import Tensor

from engine.linear import Linear
from kernels import Kernels
from kernels.weights import Int4Weight, QuantisedWeight


class _NeverPacked(Linear):
    """A product whose weight is no plain one: no kernel set keeps it in an order of its own."""

    __slots__ = ()

    @property
    def packed(self) -> None:
        return None


class QuantisedLinear(_NeverPacked):
    """A product: x `[T, in]` → x · weightᵀ + bias `[T, out]`; bias `[out]`. Parts that were merged by rows are one
    weight. How a row is rounded may depend on T until `compute_by`."""

    __slots__ = ("_invariant", "_kernels", "_quantised")

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None, kernels: Kernels) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._bias = bias
        self._quantised = weight
        self._kernels = kernels
        self._invariant = False

    def compute_by(self, kernels: Kernels) -> None:
        """From now on in a way in which a row's bits depend on that row alone."""
        self._invariant = True

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._quantised
        if isinstance(weight, Int4Weight):
            return self._kernels.int4_matmul(x, weight, self._bias, invariant=self._invariant)
        return self._kernels.fp8_matmul(x, weight, self._bias, invariant=self._invariant)


class Int8Linear(_NeverPacked):
    """A product: x `[T, in]` → x₈ · weight₈ᵀ + bias `[T, out]`, weight and x rounded to 8-bit integers as
    `Kernels.int8_matmul` says. Exact sums: a row's bits depend on that row alone."""

    __slots__ = ("_integers", "_product")

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        assert kernels.quantise_int8 is not None
        assert kernels.int8_matmul is not None
        self.num_outputs, self.num_inputs = weight.shape
        self._bias = bias
        self._integers = kernels.quantise_int8(weight)
        self._product = kernels.int8_matmul

    def compute_by(self, kernels: Kernels) -> None:
        """Nothing to do: a row's bits depend on that row alone already."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._integers, self._bias)
