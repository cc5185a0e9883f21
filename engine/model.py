"""Decoder: the one transformer decoder, driven by the flags of a `ModelConfig`.

Owns the memory of the weights, and the way from token ids over the blocks to logits. Knows no files, no requests and
no sampling. Names are those of `parameters`, blocks are made of named tensors by `assembly`, and their insides are
`block`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engine.assembly import Assembly
from engine.attention import Rotation
from engine.block import Block, ParallelBlock
from engine.cache import KVCache
from engine.experts import Experts
from engine.fused_blocks import fused_blocks
from engine.linear import Linear
from engine.model_config import ModelConfig
from engine.parameters import expert_stacks, parameter_shapes
from engine.rope import rope_tables
from engine.step_input import StepInput
from kernels import Kernels
from kernels.blocks import FusedBlocks
from kernels.weights import ExpertsWeight, KeptWeight, StackedWeight

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
    `prepare` once. `kept`: how parameters and stacks of experts that stay quantised are kept, by name; of them
    `parameters` has only the shapes. `int8`: products are of 8-bit integers (W8A8), which the kernels must have; but
    for those that choose experts."""

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
        parts_of = expert_stacks(config) if config.gated_mlp else {}
        stacks = {name: (len(parts), *shapes[parts[0]]) for name, parts in parts_of.items()}
        self.quantised: dict[str, KeptWeight] = {
            name: how.empty((shapes | stacks)[name], device) for name, how in kept.items()
        }
        # of experts that the kernels mix: [E, out, in], of biases [E, out]
        self._stacks: dict[str, Tensor | ExpertsWeight] = {}
        self.parameters: dict[str, Tensor] = {}
        alone = int8 or any(".experts." in name for name in kept if name not in stacks)
        if kernels.mix_experts is None or alone:
            assert not any(name in stacks for name in kept)  # such a set keeps none
        else:
            for name, parts in parts_of.items():
                whole = self.quantised.get(name)
                stack = torch.empty(stacks[name], dtype=dtype, device=device if whole is None else "meta")
                assert whole is None or isinstance(whole, ExpertsWeight)
                self._stacks[name] = stack if whole is None else whole
                self.parameters |= zip(parts, stack, strict=True)
                if isinstance(whole, StackedWeight):  # a file has them one by one
                    self.quantised |= {part: whole.expert(number) for number, part in enumerate(parts)}
        self.parameters |= {
            name: torch.empty(shape, dtype=dtype, device="meta" if name in kept else device)
            for name, shape in shapes.items()
            if name not in self.parameters
        }
        # whether a CUDA graph can hold a step: experts one by one have their rows counted on the host, and
        # `reference` looks there which slots there are
        self.capturable = kernels.name == "triton" and (config.moe is None or bool(self._stacks))
        # what a step of many tokens needs to make the largest of them plain
        self.scratch_bytes = dtype.itemsize * max(
            (prod(shapes[name]) for name in kept if name not in stacks), default=0
        )
        self._int8 = int8
        # whether products are the kernels', not the library's
        self.own_products = int8 or dtype in kernels.multiplies
        self._blocks: list[Block | ParallelBlock] = []

    def prepare(self, max_len: int) -> None:
        """Move the loaded `parameters` into their products, and make rope tables for `max_len` positions, which is at
        most `max_position`."""
        config = self.config
        parts = Assembly(
            config,
            self.kernels,
            parameters=self.parameters,
            quantised=self.quantised,
            stacks=self._stacks,
            device=self.device,
            int8=self._int8,
        )
        self._blocks = [parts.block(i) for i in range(config.num_layers)]
        self._embedding = self.parameters.pop("model.embed_tokens.weight")
        self._positions = self.parameters.pop("model.embed_positions.weight", None)
        self._last_norm = parts.norm("model.norm")
        tied = config.tied_embeddings
        self._head = parts.linear(self._embedding, None) if tied else parts.product("lm_head")
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
        self._table_of = [tables[config.window(i) is not None] for i in range(config.num_layers)]
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
