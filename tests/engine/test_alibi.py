"""The slopes of ALiBi are those of transformers, which rounds them to bfloat16."""

from __future__ import annotations

import pytest
import torch
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from engine.alibi import alibi_slopes


@pytest.mark.parametrize("num_heads", [1, 2, 4, 6, 8, 12, 16, 32, 71])
def test_slopes_equal_those_of_transformers(num_heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), num_heads, torch.float32)
    ours = alibi_slopes(num_heads)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.bfloat16().float(), theirs[:, 0, 1])  # [heads, 1, positions]: of position 1
