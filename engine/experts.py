"""Experts: the feed-forward half of a block as a mixture of experts (Shazeer et al. 2017).

Owns the routing, and that a token's result depends on that token alone: routing is by row, of equal shares the lower
index wins, a token's experts are added in one order, and the rows that an expert computes are padded as those of a
step are (see `runner` on determinism). `Experts` computes one expert after another, with products of any kind, and
asks the device how many tokens each has; `MixedExperts` is one operation of the kernels. Knows no norm and no
residual.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from engine.linear import Linear
from engine.mlp import MLP
from kernels import Kernels
from kernels.mixture import MixExperts, Mixture
from kernels.weights import ExpertsWeight


class Experts:
    """x `[T, hidden]` → Σ share · expert(x) over the `num_per_token` experts with the largest shares `[T, hidden]`.

    Shares are the softmax of the router's product, in fp32, and so is the sum, in the order of the experts' indices.
    `normalised`: the shares of a token's experts are divided by their sum. `row_multiple`: the rows of one expert are
    padded up to it.
    """

    __slots__ = ("_experts", "_normalised", "_num_per_token", "_router", "row_multiple")

    def __init__(
        self, router: Linear, experts: tuple[MLP, ...], *, num_per_token: int, normalised: bool
    ) -> None:
        self._router = router
        self._experts = experts
        self._num_per_token = num_per_token
        self._normalised = normalised
        self.row_multiple = 1

    def __call__(self, x: Tensor) -> Tensor:
        shares, chosen = self.routed(x)  # [T, num_per_token] each
        order = chosen.flatten().argsort(stable=True)  # by expert, then by token
        tokens, weights = order // self._num_per_token, shares.flatten()[order].unsqueeze(-1)
        counts = torch.bincount(chosen.flatten(), minlength=len(self._experts)).tolist()
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in zip(self._experts, counts, strict=True):
            if count:
                rows = tokens[start : start + count]
                made = expert(self._padded(x[rows]))[:count].float() * weights[start : start + count]
                total.index_add_(0, rows, made)  # no row is there twice
            start += count
        return total.to(x.dtype)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(shares fp32, indices of their experts), each `[T, num_per_token]`, the largest share first."""
        shares, indices = self._router(x).float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        shares, indices = shares[:, : self._num_per_token], indices[:, : self._num_per_token]
        if self._normalised:  # torch may sum in an order that depends on the number of rows
            shares = shares / reduce(torch.add, shares.unbind(dim=-1)).unsqueeze(-1)
        return shares, indices

    def _padded(self, x: Tensor) -> Tensor:
        missing = -x.shape[0] % self.row_multiple
        return x if not missing else torch.cat((x, x.new_zeros(missing, x.shape[1])))

    @property
    def products(self) -> tuple[Linear, ...]:
        return self._router, *(product for expert in self._experts for product in expert.products)


class MixedExperts:
    """As `Experts`, but gated MLPs alone, and their sum in the order of the shares."""

    __slots__ = ("_mix", "_mixture", "_router")

    def __init__(self, router: Linear, mixture: Mixture, mix: MixExperts) -> None:
        self._router = router
        self._mixture = mixture
        self._mix = mix

    def __call__(self, x: Tensor) -> Tensor:
        return self._mix(x, self._router(x), self._mixture)

    @property
    def products(self) -> tuple[Linear, ...]:
        return self._router, FirstExpert(self._mixture, self._mix)


class FirstExpert(Linear):
    """The first of `MixedExperts`, to which all rows go: what a check of products looks at."""

    __slots__ = ("_mix", "_mixture")

    def __init__(self, mixture: Mixture, mix: MixExperts) -> None:
        gate_up, down = _first(mixture.gate_up), _first(mixture.down)
        biases = mixture.gate_up_bias, mixture.down_bias
        gate_up_bias, down_bias = (None if bias is None else bias[:1] for bias in biases)
        # both products' together: what a row costs is inputs · outputs
        self.num_outputs, self.num_inputs = gate_up.shape[1] + down.shape[2], gate_up.shape[2]
        self._bias = None
        self._mixture = replace(
            mixture,
            gate_up=gate_up,
            down=down,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            num_per_token=1,
        )
        self._mix = mix

    def compute_by(self, kernels: Kernels) -> None:
        """Nothing to do: the mixture is the kernels' own already."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._mix(x, x.new_zeros(x.shape[0], 1), self._mixture)


def _first(weight: Tensor | ExpertsWeight) -> Tensor | ExpertsWeight:
    return weight[:1] if isinstance(weight, Tensor) else weight.experts(0, 1)


AllExperts: TypeAlias = Experts | MixedExperts
