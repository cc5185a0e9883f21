"""The feed-forward half of a block: x `[T, hidden]` → `[T, hidden]`.

Owns its products and what lies between them. Knows no norm and no residual.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.linear import Linear
from kernels import Activation, GatedActivation, Kernels


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(act(gate(x)) · up(x)), with gate and up in one product (Shazeer 2020)."""

    kernels: Kernels
    activation: GatedActivation
    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.act_mul(self.gate_up(x), self.activation))

    @property
    def products(self) -> tuple[Linear, ...]:
        return self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class PlainMLP:
    """down(act(up(x))) (Vaswani et al. 2017)."""

    kernels: Kernels
    activation: Activation
    up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.act(self.up(x), self.activation))

    @property
    def products(self) -> tuple[Linear, ...]:
        return self.up, self.down


MLP = GatedMLP | PlainMLP
