"""Blocks of a decoder as one operation: what `Kernels.fuse` is given, and what it makes of them.

Owns the part of the contract that names a whole block. Knows no set, no model and no checkpoint.

Such a block computes, of residual and x `[T, hidden]`, where x is what the block before it has made and residual does
not contain yet (for the first block there is no x):

    residual = residual + x;  x = out(attention(qkv(norm(residual))))
    residual = residual + x;  x = down(act_mul(gate_up(norm(residual))))

where attention norms the heads of q and k if there are `head_norms`, rotates the first `rotary_dim` channels, stores
K and V, and attends. Each operation is the one of that name in `Kernels`, rounded as it says there: fused or not, no
bit of the result differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from kernels import Attention, GatedActivation, HeadNorms, PagedKV, SharedPrefixes
from kernels.weights import PackedWeight


class Product(NamedTuple):
    """With a weight `[out, in]` in the set's own order."""

    weight: PackedWeight
    bias: Tensor | None  # [out]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BlockParts:
    """One block: hq query heads, hk key and value heads of d channels, I inner channels. RMS norms."""

    attention_norm: Tensor  # [hidden]
    mlp_norm: Tensor  # [hidden]
    eps: float  # of both norms
    offset: float
    heads: int
    kv_heads: int
    dim: int
    head_norms: HeadNorms | None
    rotary_dim: int  # 0: nothing is rotated
    rotation: int  # which of a step's rotations
    how: Attention
    activation: GatedActivation
    qkv: Product  # [(hq + 2 · hk) · d, hidden]
    out: Product  # [hidden, hq · d]
    gate_up: Product  # [2 · I, hidden]
    down: Product  # [hidden, I]


class FusedBlocks(Protocol):
    """All blocks of a decoder: `(x, residual)` behind the last one, each `[T, hidden]`. With `read` `[W]` int64, at
    most T tokens in any order, `[W, hidden]` of those alone: of the others the last block makes only K and V. May
    overwrite `residual`, which is contiguous.

    `rotations`: (cos, sin), each `[T, rotary_dim / 2]` fp32, as many as blocks ask for. `caches`: one per block, of
    one page size. The others as `store_kv` and `paged_attention` take them. Raises `ValueError` where shapes or
    dtypes break the contract.
    """

    def __call__(
        self,
        residual: Tensor,
        rotations: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[PagedKV],
        slots: Tensor,
        page_table: Tensor,
        query_start: Tensor | None,
        context_lens: Tensor,
        shared: SharedPrefixes | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


Fuse = Callable[[Sequence[BlockParts]], FusedBlocks]
