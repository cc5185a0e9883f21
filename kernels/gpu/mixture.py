"""A mixture of experts in six launches: route, group, two products of all experts at once, the activation between
them, the sum; with weights of 8 bits there are two more, which round what is multiplied. Nothing is read back to the
host, so a graph holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu.activation import act_mul
from kernels.gpu.grouped_fp8 import grouped_fp8_matmul
from kernels.gpu.grouped_int4 import grouped_int4_matmul
from kernels.gpu.grouped_matmul import grouped_matmul
from kernels.gpu.routing import combine, grouped, route
from kernels.mixture import Mixture
from kernels.weights import ExpertsWeight, Float8Experts, Int4Experts


def mix_experts(x: Tensor, logits: Tensor, mixture: Mixture) -> Tensor:
    if not x.shape[0]:
        return torch.empty_like(x)
    chosen, shares = route(logits, mixture.num_per_token, normalised=mixture.normalised)
    starts, places, sources = grouped(chosen, logits.shape[1])
    gate_up = _product(x, mixture.gate_up, mixture.gate_up_bias, sources, starts)
    made = _product(act_mul(gate_up, mixture.activation), mixture.down, mixture.down_bias, None, starts)
    return combine(made, places, shares)


def _product(
    x: Tensor, weight: Tensor | ExpertsWeight, bias: Tensor | None, sources: Tensor | None, starts: Tensor
) -> Tensor:
    if isinstance(weight, Float8Experts):
        return grouped_fp8_matmul(x, weight, bias, sources, starts)
    if isinstance(weight, Int4Experts):
        return grouped_int4_matmul(x, weight, bias, sources, starts)
    return grouped_matmul(x, weight, bias, sources, starts)
