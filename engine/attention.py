"""SelfAttention: the attention half of one block, over the pages of its layer.

Owns the way from x to queries, keys and values, their norms and rotation, and the product of what attention has
mixed. Knows no norm in front of it, no residual, and nothing of who owns the pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.linear import Linear
from engine.norm import RMSNorm, head_norms
from engine.step_input import StepInput
from kernels import Attention, Kernels, PagedKV

# cos and sin of a step's tokens, each [T, rotary_dim / 2] fp32
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfAttention:
    """hq query heads and hk key/value heads of d channels. None: this model has no such norm."""

    kernels: Kernels
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # channels of each head that are rotated; 0: this layer rotates nothing
    how: Attention
    qkv: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    out: Linear

    def __call__(self, x: Tensor, step: StepInput, pages: PagedKV, rotation: Rotation | None) -> Tensor:
        """x `[T, hidden]` → `[T, hidden]`, or `[W, hidden]` of the tokens `step.read`; K and V of all the step's
        tokens are stored. `rotation` None: nothing is rotated."""
        heads, kv_heads, dim, num_tokens = self.num_heads, self.num_kv_heads, self.head_dim, x.shape[0]
        # [T, hq + 2·hk, d]: q, k and v are views, nothing is copied
        qkv = self.qkv(x).view(num_tokens, heads + 2 * kv_heads, dim)
        q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), dim=1)
        if not self.rotary_dim:
            rotation = None
        q = self._norm_rope_store(q, k, v, step.slots, pages, rotation)
        mixed = self.kernels.paged_attention(
            q, pages, step.page_table, step.query_start, step.context_lens, self.how, step.shared
        )
        mixed = mixed.view(num_tokens, heads * dim)
        return self.out(mixed if step.read is None else mixed[step.read])

    def _norm_rope_store(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, pages: PagedKV, rotation: Rotation | None
    ) -> Tensor:
        """Norm and rotate q `[T, hq, d]` and k `[T, hk, d]`, store k and v, and return q. May overwrite all three."""
        kernels, rotated, norms = self.kernels, self.rotary_dim, None
        if self.q_norm is not None and self.k_norm is not None:
            norms = head_norms(self.q_norm, self.k_norm, self.head_dim)
        if kernels.norm_rope_store is not None and (norms is not None or self.q_norm is None):
            kernels.norm_rope_store(q, k, v, norms, rotation, pages, slots)
            return q
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm.of_heads(q), self.k_norm.of_heads(k)
        if rotation is not None and rotated == self.head_dim:
            kernels.rope(q, k, *rotation)
        elif rotation is not None:
            kernels.rope(q[..., :rotated], k[..., :rotated], *rotation)
        kernels.store_kv(k, v, pages, slots)
        return q

    @property
    def products(self) -> tuple[Linear, ...]:
        return self.qkv, self.out
