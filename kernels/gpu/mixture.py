"""A mixture of experts in six launches: route, group, two products of all experts at once, the activation between
them, the sum. Nothing is read back to the host, so a graph holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gpu.activation import act_mul
from kernels.gpu.grouped_matmul import grouped_matmul
from kernels.gpu.routing import combine, grouped, route
from kernels.mixture import Mixture


def mix_experts(x: Tensor, logits: Tensor, mixture: Mixture) -> Tensor:
    if not x.shape[0]:
        return torch.empty_like(x)
    chosen, shares = route(logits, mixture.num_per_token, normalised=mixture.normalised)
    starts, places, sources = grouped(chosen, logits.shape[1])
    inner = act_mul(grouped_matmul(x, mixture.gate_up, sources, starts), mixture.activation)
    return combine(grouped_matmul(inner, mixture.down, None, starts), places, shares)
