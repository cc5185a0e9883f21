"""Whether a decoder's blocks can be computed as one operation of the kernels, and what it is told of them.

Owns the choice: blocks of norm, attention, norm and gated MLP, whose products are the kernels' own
(`kernels.blocks`). Any other block, and so any other model, goes operation by operation. Knows no step.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.block import Block, ParallelBlock
from engine.mlp import GatedMLP
from engine.norm import RMSNorm, head_norms
from kernels import Kernels
from kernels.blocks import BlockParts, FusedBlocks


def fused_blocks(
    blocks: Sequence[Block | ParallelBlock], rotations: Sequence[int | None], kernels: Kernels
) -> FusedBlocks | None:
    """All blocks as one operation; None where the kernels have none, or it does not do one of them. `rotations`:
    which of a step's rotations each block takes, if any."""
    if kernels.fuse is None:
        return None
    parts = [_parts(block, rotation) for block, rotation in zip(blocks, rotations, strict=True)]
    known = [part for part in parts if part is not None]
    return kernels.fuse(known) if len(known) == len(parts) else None


def _parts(block: Block | ParallelBlock, rotation: int | None) -> BlockParts | None:
    if not isinstance(block, Block) or not isinstance(block.mlp, GatedMLP):
        return None
    before, between = block.attention_norm, block.mlp_norm
    plain = block.out_norm is None and block.down_norm is None and block.multiplier == 1.0
    if not plain or not isinstance(before, RMSNorm) or not isinstance(between, RMSNorm):
        return None
    attention, mlp, norms = block.attention, block.mlp, None
    q_norm, k_norm = attention.q_norm, attention.k_norm
    if q_norm is not None and k_norm is not None:
        norms = head_norms(q_norm, k_norm, attention.head_dim)
    products = [product.packed for product in (attention.qkv, attention.out, mlp.gate_up, mlp.down)]
    qkv, out, gate_up, down = products
    if qkv is None or out is None or gate_up is None or down is None:
        return None
    if before.eps_and_offset != between.eps_and_offset:
        return None
    if norms is None and not (q_norm is None and k_norm is None):
        return None
    eps, offset = before.eps_and_offset
    return BlockParts(
        attention_norm=before.weight,
        mlp_norm=between.weight,
        eps=eps,
        offset=offset,
        heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        dim=attention.head_dim,
        head_norms=norms,
        rotary_dim=0 if rotation is None else attention.rotary_dim,
        rotation=rotation or 0,
        how=attention.how,
        activation=mlp.activation,
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
    )
