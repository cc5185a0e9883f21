"""Rivals: torch's own attention on K and V that lie contiguous.

Owns the ways in which torch can be asked for the same result. Of the ways that work the quickest counts; why another
did not is kept. Knows no pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from tests.bench.gpu.timing import seconds_of

if TYPE_CHECKING:
    from tests.bench.gpu.attention import Case, Inputs


def sdpa(case: Case, inputs: Inputs, device: str) -> dict[str, Any]:
    """`seconds`, `out` [rows, heads, queries, dim], `how` it was asked, `why` other ways failed."""
    q, k, v = inputs.queries, inputs.keys, inputs.values
    ways: dict[str, Callable[[], Tensor]] = {}
    if case.queries == 1 and case.window is None:
        ways["enable_gqa"] = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        # the heads that read one kv head, as its queries: nothing is causal about them
        grouped = q.view(case.rows, case.kv_heads, -1, case.dim)
        ways["heads as queries"] = lambda: F.scaled_dot_product_attention(grouped, k, v).view(q.shape)
        return _quickest(ways, device)
    how: dict[str, Any] = {"is_causal": True}
    if case.window is not None:
        how = {"attn_mask": _windowed(case, device)}
    elif case.queries < case.context:
        how = {"attn_mask": causal_lower_right(case.queries, case.context)}
    ways["enable_gqa"] = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
    wide_k, wide_v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
    ways["repeated heads"] = lambda: F.scaled_dot_product_attention(q, wide_k, wide_v, **how)
    return _quickest(ways, device)


def _windowed(case: Case, device: str) -> Tensor:
    """[queries, context]: which tokens a query sees."""
    assert case.window is not None
    ahead = torch.arange(case.context, device=device) - torch.arange(case.queries, device=device)[:, None]
    ahead -= case.context - case.queries
    return (ahead <= 0) & (ahead > -case.window)


def flex(case: Case, inputs: Inputs, device: str) -> dict[str, Any]:
    """As `sdpa`, of FlexAttention, compiled for this shape."""
    q, k, v = inputs.queries, inputs.keys, inputs.values
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        mask = None
        if case.queries > 1:
            offset, window = case.context - case.queries, case.window or case.context
            mask = create_block_mask(
                lambda b, h, i, j: (i + offset >= j) & (j > i + offset - window),
                None, None, case.queries, case.context, device=device,
            )  # fmt: skip
    except Exception as error:  # whatever a compiler cannot do here is a finding, not a fault
        return {"why": _short(error)}
    return _quickest({"compiled": lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)}, device)


def _quickest(ways: dict[str, Callable[[], Tensor]], device: str) -> dict[str, Any]:
    found: list[tuple[float, str, Tensor]] = []
    failed: list[str] = []
    for how, call in ways.items():
        try:
            with torch.inference_mode():
                found.append((seconds_of(call, device), how, call()))
        except Exception as error:  # one way of several; the reason is told
            failed.append(f"{how}: {_short(error)}")
    why = "; ".join(failed)
    if not found:
        return {"why": why}
    seconds, how, out = min(found, key=lambda way: way[0])
    return {"seconds": seconds, "how": how, "out": out, "why": why}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
