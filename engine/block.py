"""Block and ParallelBlock: one layer of the decoder, attention and MLP around the residual stream.

Owns the order of norms, halves and additions. Knows neither half's insides. What the last half has made is handed
on beside the residual instead of being added to it, because the next norm adds both in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.attention import Rotation, SelfAttention
from engine.experts import AllExperts
from engine.linear import Linear
from engine.mlp import MLP
from engine.norm import Norm, added
from engine.step_input import StepInput
from kernels import PagedKV


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Attention, then the MLP, which sees what attention has added. None: this model has no such norm."""

    attention_norm: Norm | None  # of what attention sees
    attention: SelfAttention
    out_norm: Norm | None  # of what attention adds
    mlp_norm: Norm | None  # of what the MLP sees
    mlp: MLP | AllExperts
    down_norm: Norm | None  # of what the MLP adds
    multiplier: float  # of what either adds

    def __call__(
        self, x: Tensor | None, residual: Tensor, step: StepInput, pages: PagedKV, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) of the next block, each `[T, hidden]`, or of the tokens `step.read`; x is what
        `residual` does not contain yet, None in front of the first block. May overwrite `residual`."""
        x, residual = added(self.attention_norm, x, residual)
        x = self.attention(x, step, pages, rotation)
        if step.read is not None:
            residual = residual[step.read]
        if self.out_norm is not None:
            x = self.out_norm(x)
        if self.multiplier != 1.0:
            x = x * self.multiplier
        x, residual = added(self.mlp_norm, x, residual)
        x = self.mlp(x)
        if self.down_norm is not None:
            x = self.down_norm(x)
        if self.multiplier != 1.0:
            x = x * self.multiplier
        return x, residual

    @property
    def products(self) -> tuple[Linear, ...]:
        return *self.attention.products, *self.mlp.products


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelBlock:
    """Attention and MLP side by side: both see the residual as it was in front of the block."""

    attention_norm: Norm | None  # of what attention sees
    attention: SelfAttention
    mlp_norm: Norm | None  # of what the MLP sees; None: it sees what attention sees
    mlp: MLP | AllExperts
    multiplier: float  # of what both add

    def __call__(
        self, x: Tensor | None, residual: Tensor, step: StepInput, pages: PagedKV, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """As `Block`."""
        seen, residual = added(self.attention_norm, x, residual)
        mixed = self.attention(seen, step, pages, rotation)
        if step.read is not None:
            seen, residual = seen[step.read], residual[step.read]
        if self.mlp_norm is not None:
            seen = self.mlp_norm(residual)
        x = mixed + self.mlp(seen)
        return (x if self.multiplier == 1.0 else x * self.multiplier), residual

    @property
    def products(self) -> tuple[Linear, ...]:
        return *self.attention.products, *self.mlp.products
