"""Products of groups, held against each group's product alone.

Owns the rows: gathered from others, some groups without any, and one row that is NaN. Knows no kind of weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def assert_each_is_as_alone(
    grouped: Callable[..., Tensor],
    alone: Callable[[Tensor, Any, Tensor | None], Tensor],
    weight: Any,
    counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    biased: bool,
) -> None:
    """Bit for bit. `grouped`: as `grouped_matmul`; `weight`: its stack, one of which `expert` gives to `alone`.
    `counts`: rows of each group."""
    (experts, outputs, width), rows = weight.shape, sum(counts)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows + 3, width + 16, generator=generator).to(device, dtype)[:, :width]
    sources = torch.randint(rows + 3, (rows,), generator=generator).to(device, torch.int32)
    bias = torch.randn(experts, outputs, generator=generator).to(device, dtype) if biased else None
    x[int(sources[0])] = float("nan")
    starts = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    gathered = x[sources.long()]
    found = grouped(x, weight, bias, sources, starts)
    direct = grouped(gathered, weight, bias, None, starts)
    for group, (start, end) in enumerate(pairwise(starts.tolist())):
        if start < end:
            one = None if bias is None else bias[group]
            wanted = alone(gathered[start:end], weight.expert(group), one)
            for made in (found, direct):
                assert torch.equal(made[start:end].nan_to_num(9.0), wanted.nan_to_num(9.0))
    assert found.isnan().any(dim=1).tolist() == (sources == sources[0]).tolist()
