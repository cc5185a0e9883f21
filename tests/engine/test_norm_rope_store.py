"""The attention half of a block on a set that norms, rotates and stores at once: what it does is what the set's
single operations do, with every kind of head norm and rotation a model may have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.attention import SelfAttention
from engine.linear import Linear
from engine.norm import RMSNorm
from engine.step_input import StepInput
from kernels import Attention, HeadNorms, Kernels, kernels_for
from tests.support.hopping import triton_kernels
from tests.support.paged import empty_cache, laid_out

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 32, 24


class Counted:
    """An operation that counts its calls."""

    def __init__(self, kernels: Kernels) -> None:
        assert kernels.norm_rope_store is not None
        self._operation = kernels.norm_rope_store
        self.norms: list[HeadNorms | None] = []

    def __call__(self, q, k, v, norms, rotation, cache, slots) -> None:  # type: ignore[no-untyped-def]
        self.norms.append(norms)
        self._operation(q, k, v, norms, rotation, cache, slots)


def attended(kernels: Kernels, rotary_dim: int, qk_norm: str | None, rotated: bool) -> list[torch.Tensor]:
    """What a layer gives for two rows, and what it leaves in its pages."""
    torch.manual_seed(3)

    def norm(heads: int) -> RMSNorm | None:
        weight = torch.randn(DIM if qk_norm == "head" else heads * DIM)
        return None if qk_norm is None else RMSNorm(kernels, weight, 1e-6, 1.0)

    attention = SelfAttention(
        kernels=kernels,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        rotary_dim=rotary_dim,
        how=Attention(DIM**-0.5),
        qkv=Linear(torch.randn((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), None),
        q_norm=norm(HEADS),
        k_norm=norm(KV_HEADS),
        out=Linear(torch.randn(HIDDEN, HEADS * DIM), None),
    )
    step = StepInput(
        token_ids=torch.zeros(5, dtype=torch.int64),
        positions=torch.tensor([0, 1, 2, 0, 0]),
        slots=torch.tensor([16, 17, 18, 0, -1]),
        page_table=torch.tensor([[1], [0]], dtype=torch.int32),
        query_start=torch.tensor([0, 3, 4], dtype=torch.int32),
        context_lens=torch.tensor([3, 1], dtype=torch.int32),
        logit_rows=torch.tensor([2, 3]),
        scored_rows=torch.empty(0, dtype=torch.int64),
    )
    angles = torch.rand(5, max(rotary_dim, 2) // 2)
    cache = laid_out(empty_cache(2, KV_HEADS, DIM, 16, torch.float32, scaled=False), kernels)
    out = attention(torch.randn(5, HIDDEN), step, cache, (angles.cos(), angles.sin()) if rotated else None)
    return [out, cache.keys.nan_to_num(7.0), cache.values.nan_to_num(7.0)]


@pytest.mark.parametrize(
    ("rotary_dim", "qk_norm", "rotated"),
    [
        (32, "head", True),
        (12, "head", True),
        (32, None, True),
        (0, None, True),
        (0, "head", False),
        (32, "all", True),
    ],
)
def test_a_layer_gives_the_same_either_way(rotary_dim: int, qk_norm: str | None, rotated: bool) -> None:
    triton = triton_kernels()
    counted = Counted(triton)
    found = attended(replace(triton, norm_rope_store=counted), rotary_dim, qk_norm, rotated)
    wanted = attended(replace(triton, norm_rope_store=None), rotary_dim, qk_norm, rotated)
    reference = attended(kernels_for("cpu", "reference"), rotary_dim, qk_norm, rotated)
    assert [norms is not None for norms in counted.norms] == ([] if qk_norm == "all" else [qk_norm == "head"])
    for one, two, three in zip(found, wanted, reference, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-4)
