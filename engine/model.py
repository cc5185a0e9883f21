"""Decoder: the one transformer decoder, driven by the flags of a `ModelConfig`.

Owns the order of operations and the tensors of the weights, under Hugging Face names, with q, k, v merged
into `qkv_proj` and gate, up into `gate_up_proj` (one product each instead of three and two). Knows no files,
no requests and no sampling. Weights are plain tensors, not `nn.Module`s: nothing here is trained, and the
attribute machinery of modules costs more than the small operations of a decode step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.cache import KVCache
from engine.config import ModelConfig
from engine.rope import rope_tables
from engine.step_input import StepInput
from kernels import Kernels


class Linear:
    """A product: x `[T, in]` → x · weightᵀ + bias `[T, out]`; weight `[out, in]`, bias `[out]`.

    On a CPU in bf16 the weight is kept in oneDNN's blocked order instead of the plain one, where torch can do
    that: the results are bit-equal and a product of one row takes half the time.
    """

    __slots__ = ("_bias", "_packed", "_weight", "num_inputs", "num_outputs")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._bias = bias
        self._packed = _packed(weight)
        self._weight = weight if self._packed is None else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
            return product
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)


def _packed(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):  # a torch or a processor without it
        return None
    return packed


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's norms and products. None: this model has no such norm."""

    attention_norm: Tensor | None
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    uses_rope: bool
    out: Linear
    out_norm: Tensor | None
    mlp_norm: Tensor | None
    gate_up: Linear
    down: Linear
    down_norm: Tensor | None


# Of the layer's four norms over the hidden channels, by `norm_position`: its name in checkpoints
NORM_NAMES: Mapping[str, Mapping[str, str]] = {
    "before": {"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    "after": {"out": "post_attention_layernorm", "down": "post_feedforward_layernorm"},
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor the decoder holds. A tied head has no tensor of its own."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        for norm in NORM_NAMES[config.norm_position].values():
            shapes[f"{layer}.{norm}.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.qkv_proj.weight"] = (heads + 2 * kv_heads, hidden)
        if config.qk_norm is not None:
            each = config.qk_norm == "head"
            shapes[f"{layer}.self_attn.q_norm.weight"] = (config.head_dim if each else heads,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim if each else kv_heads,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads)
        shapes[f"{layer}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        if config.qkv_bias:
            shapes[f"{layer}.self_attn.qkv_proj.bias"] = (heads + 2 * kv_heads,)
        if config.out_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        if config.mlp_bias:
            shapes[f"{layer}.mlp.gate_up_proj.bias"] = (2 * inner,)
            shapes[f"{layer}.mlp.down_proj.bias"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


class Decoder:
    """`parameters` is uninitialised memory until `weights.load_weights` has filled it; then `prepare` once."""

    def __init__(self, config: ModelConfig, kernels: Kernels, *, dtype: torch.dtype, device: str) -> None:
        self.config = config
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        self.parameters: dict[str, Tensor] = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, shape in parameter_shapes(config).items()
        }
        self._layers: list[Layer] = []

    def prepare(self, max_len: int) -> None:
        """Move the loaded `parameters` into their products, and make rope tables for `max_len` positions."""
        config, take = self.config, self.parameters.pop  # a packed weight frees its plain copy at once

        def product(name: str) -> Linear:
            return Linear(take(f"{name}.weight"), take(f"{name}.bias", None))

        names = NORM_NAMES[config.norm_position]

        def norm(layer: str, place: str) -> Tensor | None:
            return take(f"{layer}.{names[place]}.weight") if place in names else None

        self._layers = [
            Layer(
                attention_norm=norm(layer, "attention"),
                qkv=product(f"{layer}.self_attn.qkv_proj"),
                q_norm=take(f"{layer}.self_attn.q_norm.weight", None),
                k_norm=take(f"{layer}.self_attn.k_norm.weight", None),
                uses_rope=i not in config.no_rope_layers,
                out=product(f"{layer}.self_attn.o_proj"),
                out_norm=norm(layer, "out"),
                mlp_norm=norm(layer, "mlp"),
                gate_up=product(f"{layer}.mlp.gate_up_proj"),
                down=product(f"{layer}.mlp.down_proj"),
                down_norm=norm(layer, "down"),
            )
            for i, layer in ((i, f"model.layers.{i}") for i in range(config.num_layers))
        ]
        self._embedding = take("model.embed_tokens.weight")
        self._norm = take("model.norm.weight")
        head = self._embedding if config.tied_embeddings else take("lm_head.weight")
        self._head = Linear(head, None)
        self._cos, self._sin = rope_tables(config, max_len, self.device)

    def distinct_products(self) -> list[Linear]:
        """One product of each shape that occurs: what a check of products must look at."""
        layer = self._layers[0]
        return [layer.qkv, layer.out, layer.gate_up, layer.down, self._head]

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Run all tokens of the step and store their K and V. Logits `[S, vocab]` of `step.logit_rows`."""
        config, kernels, eps = self.config, self.kernels, self.config.rms_norm_eps
        num_tokens = step.token_ids.shape[0]
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        scale = dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        rotated, added = config.rotary_dim, config.residual_multiplier
        cos, sin = self._cos[step.positions], self._sin[step.positions]  # [T, rotated / 2]
        residual = self._embedding[step.token_ids]  # [T, hidden]
        if config.embedding_multiplier != 1.0:
            residual = residual * config.embedding_multiplier
        x: Tensor | None = None  # what the last part of a block made and `residual` does not contain yet
        for layer, pages in zip(self._layers, cache.layers, strict=True):
            x, residual = self._added(x, residual, layer.attention_norm)
            # [T, heads + 2·kv_heads, d]: q, k and v are views, nothing is copied
            qkv = layer.qkv(x).view(num_tokens, heads + 2 * kv_heads, dim)
            q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._normed(q, layer.q_norm), self._normed(k, layer.k_norm)
            if layer.uses_rope and rotated == dim:
                kernels.rope(q, k, cos, sin)
            elif layer.uses_rope:
                kernels.rope(q[..., :rotated], k[..., :rotated], cos, sin)
            kernels.store_kv(k, v, pages, step.slots)
            mixed = kernels.paged_attention(
                q, pages, step.page_table, step.query_start, step.context_lens, scale
            )
            x = layer.out(mixed.view(num_tokens, heads * dim))
            if layer.out_norm is not None:
                x = kernels.rms_norm(x, layer.out_norm, eps)
            if added != 1.0:
                x = x * added
            x, residual = self._added(x, residual, layer.mlp_norm)
            x = layer.down(kernels.silu_mul(layer.gate_up(x)))
            if layer.down_norm is not None:
                x = kernels.rms_norm(x, layer.down_norm, eps)
            if added != 1.0:
                x = x * added
        assert x is not None  # there is at least one layer
        if step.logit_rows.shape[0] == 0:
            return x.new_empty((0, config.vocab_size))
        # only the rows that sample reach the last norm and the head
        x, _ = kernels.add_rms_norm(x[step.logit_rows], residual[step.logit_rows], self._norm, eps)
        logits = self._head(x)
        return logits if config.logits_scaling == 1.0 else logits / config.logits_scaling

    def _added(self, x: Tensor | None, residual: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """(residual + x, normed where there is a norm; residual + x), each `[T, hidden]`."""
        if norm is None:
            total = residual if x is None else x + residual
            return total, total
        if x is None:
            return self.kernels.rms_norm(residual, norm, self.config.rms_norm_eps), residual
        return self.kernels.add_rms_norm(x, residual, norm, self.config.rms_norm_eps)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Heads `[T, h, d]` normed over as many channels as there are weights: one head's or all."""
        rows = x.reshape(-1, weight.shape[0])
        return self.kernels.rms_norm(rows, weight, self.config.rms_norm_eps).view(x.shape)
