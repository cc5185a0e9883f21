"""A product keeps its weight once: in whatever order it is kept, the plain one's memory is free again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import linear
from engine.linear import Linear
from kernels import kernels_for


def keeps(product: Linear, weight: Tensor) -> bool:
    """Whether any tensor of the product lies in the weight's memory."""
    address = weight.untyped_storage().data_ptr()
    held = [getattr(product, name, None) for name in Linear.__slots__]
    return any(isinstance(one, Tensor) and one.untyped_storage().data_ptr() == address for one in held)


def test_a_weight_in_the_librarys_order_is_not_kept_in_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every processor has such an order: a copy stands in for it."""
    monkeypatch.setattr(linear, "_blocked", Tensor.clone)
    weight = torch.randn(48, 64)
    assert not keeps(Linear(weight, None), weight)


def test_a_packed_weight_is_not_kept_in_the_plain_order() -> None:
    weight = torch.randn(48, 64)
    product = Linear(weight, None)
    assert keeps(product, weight) or product._blocked is not None
    product.compute_by(kernels_for("cpu", "cpu"))
    assert not keeps(product, weight)
    x = torch.randn(5, 64)
    torch.testing.assert_close(product(x), x @ weight.T)
