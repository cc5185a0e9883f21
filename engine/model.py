"""Decoder: the one transformer decoder, driven by the flags of a `ModelConfig`.

Owns the tensors of the weights, how they become blocks, and the way from token ids over the blocks to logits.
Knows no files, no requests and no sampling, and leaves names to `parameters` and the insides of a block to `block`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engine.alibi import alibi_slopes
from engine.attention import Rotation, SelfAttention
from engine.block import Block, ParallelBlock
from engine.cache import KVCache
from engine.config import MixtureOfExperts, ModelConfig
from engine.experts import AllExperts, Experts, MixedExperts
from engine.fused_blocks import fused_blocks
from engine.linear import Linear
from engine.mlp import MLP, GatedMLP, PlainMLP
from engine.norm import LayerNorm, Norm, RMSNorm
from engine.parameters import NORM_NAMES, expert_stacks, parameter_shapes
from engine.quantised_linear import Int8Linear, QuantisedLinear
from engine.rope import rope_tables
from engine.step_input import StepInput
from kernels import Attention, Kernels
from kernels.blocks import FusedBlocks
from kernels.mixture import Mixture
from kernels.weights import QuantisedWeight

if TYPE_CHECKING:
    from engine.kept_weights import WeightFormat


class Hidden(NamedTuple):
    """What the last block leaves of a step: `added` and `residual`, whose sum goes to the last norm and the head,
    each `[T, hidden]`, or `[W, hidden]` of the tokens `read`."""

    added: Tensor
    residual: Tensor
    read: Tensor | None  # as in `StepInput`


class Decoder:
    """`parameters` and `quantised` are uninitialised memory until `weights.load_weights` has filled them; then
    `prepare` once. `kept`: how parameters that stay quantised are kept, by name; of them `parameters` has only the
    shapes. `int8`: products are of 8-bit integers (W8A8), which the kernels must have; but for those that
    choose experts."""

    crowded_by: str | None = None  # what may make a row depend on the others, beside products: nothing

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: str,
        kept: Mapping[str, WeightFormat] | None = None,
        int8: bool = False,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        shapes, kept = parameter_shapes(config), kept or {}
        # of experts that the kernels mix: [E, out, in], of biases [E, out]
        self._stacks: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        if _mixes_experts(config, kernels) and not int8 and not any(".experts." in name for name in kept):
            for name, parts in expert_stacks(config).items():
                stack = torch.empty((len(parts), *shapes[parts[0]]), dtype=dtype, device=device)
                self._stacks[name] = stack
                self.parameters |= zip(parts, stack, strict=True)
        self.parameters |= {
            name: torch.empty(shape, dtype=dtype, device="meta" if name in kept else device)
            for name, shape in shapes.items()
            if name not in self.parameters
        }
        # whether a CUDA graph can hold a step: experts one by one have their rows counted on the host, and
        # `reference` looks there which slots there are
        self.capturable = kernels.name == "triton" and (config.moe is None or bool(self._stacks))
        self.quantised: dict[str, QuantisedWeight] = {
            name: how.empty(shapes[name], device) for name, how in kept.items()
        }
        # what a step takes to make the largest of them plain, if it has many tokens
        self.scratch_bytes = dtype.itemsize * max((prod(shapes[name]) for name in kept), default=0)
        self._int8 = int8
        # whether products are the kernels', not the library's
        self.own_products = int8 or dtype in kernels.multiplies
        self._blocks: list[Block | ParallelBlock] = []

    def prepare(self, max_len: int) -> None:
        """Move the loaded `parameters` into their products, and make rope tables for `max_len` positions, which is at
        most `max_position`."""
        config = self.config
        self._blocks = [self._block(i) for i in range(config.num_layers)]
        self._embedding = self.parameters.pop("model.embed_tokens.weight")
        self._positions = self.parameters.pop("model.embed_positions.weight", None)
        self._last_norm = self._norm("model.norm")
        tied = config.tied_embeddings
        self._head = self._linear(self._embedding, None) if tied else self._product("lm_head")
        self._multiplier = config.embedding_multiplier
        if config.rounds_embedding_multiplier:
            self._multiplier = float(torch.tensor(self._multiplier).to(self.dtype))
        self._tables: tuple[Rotation, ...] = ()
        if config.positions == "rope":
            self._tables += (rope_tables(config, max_len, self.device),)
        if config.windowed_rope_theta is not None:
            windowed = replace(config, rope_theta=config.windowed_rope_theta, rope_scaling=None)
            self._tables += (rope_tables(windowed, max_len, self.device),)
        tables = (0, len(self._tables) - 1) if self._tables else (None, None)  # without a window, with one
        self._table_of = [tables[self._window(i) is not None] for i in range(config.num_layers)]
        self._fused = self._fuse()

    def distinct_products(self) -> list[Linear]:
        """One product of each shape that occurs: what a check of products must look at."""
        products = self._products()
        return list({(type(product), product.shape): product for product in products}.values())

    def invariant_products(self) -> bool:
        """From now on compute all products by the kernels' own, if there is one: whether that is new."""
        if self.kernels.matmul is None or self.own_products:
            return False
        self.own_products = True
        for product in self._products():
            product.compute_by(self.kernels)
        self._fused = self._fuse()
        return True

    def _fuse(self) -> FusedBlocks | None:
        """All blocks as one operation. None: that cannot be had."""
        return fused_blocks(self._blocks, self._table_of, self.kernels)

    def _products(self) -> list[Linear]:
        return [*(product for block in self._blocks for product in block.products), self._head]

    def pad_groups(self, row_multiple: int) -> None:
        """From now on pad the rows that an expert computes up to `row_multiple`, as `StepInput` pads a step's."""
        for block in self._blocks:
            if isinstance(block.mlp, Experts):
                block.mlp.row_multiple = row_multiple

    def forward(self, step: StepInput, cache: KVCache) -> Tensor:
        """Run all tokens of the step and store their K and V. Logits `[S, vocab]` of `step.logit_rows`."""
        return self.logits(self.hidden(step, cache), step.logit_rows)

    def hidden(self, step: StepInput, cache: KVCache) -> Hidden:
        """As `forward`, but what is before the last norm and the head, of the tokens that are read."""
        # [T, hidden]; of the layers that see everything, and of those with a window: cos and sin, each
        # [T, rotary_dim / 2]
        residual, rotations = self.kernels.look_up(
            step.token_ids, step.positions, self._embedding, self._tables
        )
        if self._multiplier != 1.0:
            residual = residual * self._multiplier
        if self._positions is not None:
            residual = residual + self._positions[step.positions]
        if self._fused is not None:
            rows = step.slots, step.page_table, step.query_start, step.context_lens, step.shared
            return Hidden(*self._fused(residual, rotations, cache.layers, *rows, step.read), step.read)
        x: Tensor | None = None
        last = self._blocks[-1]
        whole = step if step.read is None else replace(step, read=None)  # for all blocks but the last
        for block, pages, table in zip(self._blocks, cache.layers, self._table_of, strict=True):
            rotation = None if table is None else rotations[table]
            x, residual = block(x, residual, step if block is last else whole, pages, rotation)
        assert x is not None  # there is at least one layer
        return Hidden(x, residual, step.read)

    def logits(self, hidden: Hidden, rows: Tensor | None) -> Tensor:
        """`[N, vocab]` of the tokens `rows` `[N]` of a step, which are among those read. Only they reach the last
        norm and the head. None: of all that were read; `hidden` is overwritten then."""
        config, (added, residual, read) = self.config, hidden
        if rows is not None:
            if rows.shape[0] == 0:
                return added.new_empty((0, config.vocab_size))
            if read is not None:
                rows = torch.searchsorted(read, rows)
            added, residual = added[rows], residual[rows]
        x, _ = self._last_norm.added(added, residual)
        logits = self._head(x)
        if config.logits_scaling != 1.0:
            logits = logits / config.logits_scaling
        if config.logits_softcap is not None:
            logits = self.kernels.softcap(logits, config.logits_softcap)
        return logits

    def _block(self, index: int) -> Block | ParallelBlock:
        config, layer, places = self.config, f"model.layers.{index}", NORM_NAMES[self.config.norm_position]

        def norm(place: str) -> Norm | None:
            return self._norm(f"{layer}.{places[place]}") if place in places else None

        if config.parallel:
            return ParallelBlock(
                attention_norm=norm("attention"),
                attention=self._attention(index),
                mlp_norm=norm("mlp"),
                mlp=self._mlp(index),
                multiplier=config.residual_multiplier,
            )
        return Block(
            attention_norm=norm("attention"),
            attention=self._attention(index),
            out_norm=norm("out"),
            mlp_norm=norm("mlp"),
            mlp=self._mlp(index),
            down_norm=norm("down"),
            multiplier=config.residual_multiplier,
        )

    def _attention(self, index: int) -> SelfAttention:
        config, part = self.config, f"model.layers.{index}.self_attn"
        return SelfAttention(
            kernels=self.kernels,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary_dim=0 if index in config.no_rope_layers else config.rotary_dim,
            how=self._how(index),
            qkv=self._product(f"{part}.qkv_proj"),
            q_norm=self._head_norm(f"{part}.q_norm"),
            k_norm=self._head_norm(f"{part}.k_norm"),
            out=self._product(f"{part}.o_proj"),
        )

    def _window(self, index: int) -> int | None:
        return self.config.windows[index] if self.config.windows else None

    def _how(self, index: int) -> Attention:
        config = self.config
        scale = config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        slopes = None
        if config.positions == "alibi":
            slopes = (alibi_slopes(config.num_heads) * scale).to(self.device)
        sinks = self.parameters.pop(f"model.layers.{index}.self_attn.sinks", None)
        return Attention(
            scale,
            window=self._window(index),
            softcap=config.attention_softcap,
            slopes=slopes,
            sinks=None if sinks is None else sinks.float(),
        )

    def _product(self, name: str) -> Linear:
        # taken out of `parameters`, so that a packed weight frees its plain copy at once
        weight, bias = self.parameters.pop(f"{name}.weight"), self.parameters.pop(f"{name}.bias", None)
        kept = self.quantised.pop(f"{name}.weight", None)
        if kept is not None:
            return QuantisedLinear(kept, bias, self.kernels)
        return self._linear(weight, bias, plain=name.endswith(".mlp.gate"))

    def _linear(self, weight: Tensor, bias: Tensor | None, *, plain: bool = False) -> Linear:
        kind = Int8Linear if self._int8 and not plain else Linear
        return kind(weight, bias, self.kernels)

    def _mlp(self, index: int) -> MLP | AllExperts:
        part, moe = f"model.layers.{index}.mlp", self.config.moe
        if moe is None or index in moe.dense_layers:
            return self._one_mlp(part)
        router = self._product(f"{part}.gate")
        if self._stacks:
            return self._mixture(router, f"{part}.experts", moe)
        return Experts(
            router,
            tuple(self._one_mlp(f"{part}.experts.{expert}") for expert in range(moe.num_experts)),
            num_per_token=moe.num_per_token,
            normalised=moe.normalised,
        )

    def _mixture(self, router: Linear, part: str, moe: MixtureOfExperts) -> MixedExperts:
        for expert in range(moe.num_experts):
            for name in ("gate_up_proj", "down_proj"):
                del self.parameters[f"{part}.{expert}.{name}.weight"]
                self.parameters.pop(f"{part}.{expert}.{name}.bias", None)
        mixture = Mixture(
            gate_up=self._stacks[f"{part}.gate_up_proj.weight"],
            down=self._stacks[f"{part}.down_proj.weight"],
            gate_up_bias=self._stacks.get(f"{part}.gate_up_proj.bias"),
            down_bias=self._stacks.get(f"{part}.down_proj.bias"),
            activation=self.config.activation,
            num_per_token=moe.num_per_token,
            normalised=moe.normalised,
        )
        assert self.kernels.mix_experts is not None
        return MixedExperts(router, mixture, self.kernels.mix_experts)

    def _one_mlp(self, part: str) -> MLP:
        name = "gate_up_proj" if self.config.gated_mlp else "up_proj"
        up, down = self._product(f"{part}.{name}"), self._product(f"{part}.down_proj")
        if self.config.gated_mlp:
            return GatedMLP(self.kernels, self.config.activation, up, down)
        assert self.config.activation != "swiglu_oai"  # gated by what it is
        return PlainMLP(self.kernels, self.config.activation, up, down)

    def _norm(self, name: str) -> Norm:
        weight, bias = self.parameters.pop(f"{name}.weight"), self.parameters.pop(f"{name}.bias", None)
        if self.config.norm_kind == "rms":
            assert bias is None
            return RMSNorm(self.kernels, weight, self.config.norm_eps, self.config.norm_offset)
        return LayerNorm(self.kernels, weight, bias, self.config.norm_eps)

    def _head_norm(self, name: str) -> RMSNorm | None:
        """Of q or k. None: this model has no such norm."""
        weight = self.parameters.pop(f"{name}.weight", None)
        if weight is None:
            return None
        return RMSNorm(self.kernels, weight, self.config.norm_eps, self.config.norm_offset)


def _mixes_experts(config: ModelConfig, kernels: Kernels) -> bool:
    return kernels.mix_experts is not None and config.gated_mlp
