"""A mixture of experts as one operation: what `Kernels.mix_experts` is given, and what it makes of it.

Owns that part of the contract. Knows no set, no model and no checkpoint. Of tokens x `[T, hidden]`, the products
`logits` `[T, E]` of a router with them, and E experts of I inner channels, whose weights lie one after the other,

    shares = softmax(logits), in fp32; of a token the `num_per_token` largest count, of equals the lower indices
    made_e = down_e · act_mul(gate_up_e · x + its bias) + its bias, each of the three rounded to the dtype
    result = Σ share_e · made_e over those experts, in fp32 and in the order of the shares, rounded once

(Shazeer et al. 2017). Weights of 4 bits are what they stand for, rounded to the dtype of x; products with weights of
8 bits are those of `fp8_matmul`, for which what they multiply is rounded, too, and with integers of 4 bits those of
`int4_matmul`. Only a set that `keeps` them takes
them. A token with a logit of NaN, or whose largest is infinite, becomes NaN and harms no other.
Nothing is asked of the host: how many tokens an expert gets decides no launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels import GatedActivation
from kernels.weights import ExpertsWeight


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Mixture:
    """The experts of one layer, and how they are mixed."""

    gate_up: Tensor | ExpertsWeight  # [E, 2 · I, hidden], contiguous
    down: Tensor | ExpertsWeight  # [E, hidden, I], contiguous
    gate_up_bias: Tensor | None = None  # [E, 2 · I], contiguous
    down_bias: Tensor | None = None  # [E, hidden], contiguous
    activation: GatedActivation
    num_per_token: int  # 1 to E
    normalised: bool  # the shares of a token's experts are divided by their sum


class MixExperts(Protocol):
    def __call__(self, x: Tensor, logits: Tensor, mixture: Mixture) -> Tensor: ...
