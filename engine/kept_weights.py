"""Kept weights: which parameters of a decoder stay quantised as the checkpoint stores them.

Owns the choice, by what the kernel set multiplies with and what the checkpoint's modules are. All parts of a merged
parameter must be stored alike. Experts of a layer lie side by side where kernels mix them: in MXFP4 they do in the
file, in FP8 and in 4 bits where all are stored alike. What is not chosen is made plain when it is loaded. Knows no
bits and no bytes (`packed_module`, `float8_module`, `float4_module`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from engine.float4_module import Float4Module
from engine.float8_module import Float8Module
from engine.model_config import ModelConfig
from engine.packed_module import PackedModule
from engine.parameters import expert_stacks, parameter_shapes
from engine.placement import canonical_name, weight_targets
from engine.quantised_source import QuantisedModule, QuantisedSource
from engine.weight_source import WeightSource
from kernels.weights import (
    BLOCK,
    Float4Weight,
    Float8Experts,
    Float8Weight,
    Int4Experts,
    Int4Weight,
    KeptWeight,
    StackedWeight,
)


@dataclass(frozen=True, slots=True)
class Int4Format:
    """How an `Int4Weight` is made, but for its size."""

    group_size: int
    scale: torch.dtype
    ordered: bool

    def empty(self, shape: tuple[int, ...], device: str) -> Int4Weight:
        """Uninitialised memory. `shape`: (outputs, inputs)."""
        outputs, inputs = shape
        return Int4Weight.empty(
            outputs, inputs, self.group_size, scale=self.scale, device=device, ordered=self.ordered
        )


@dataclass(frozen=True, slots=True)
class Float8Format:
    """How a `Float8Weight` is made, but for its size."""

    blocks: bool

    def empty(self, shape: tuple[int, ...], device: str) -> Float8Weight:
        """Uninitialised memory. `shape`: (outputs, inputs)."""
        outputs, inputs = shape
        return Float8Weight.empty(outputs, inputs, blocks=self.blocks, device=device)


@dataclass(frozen=True, slots=True)
class Float4Format:
    """How a `Float4Weight` is made, but for its size."""

    def empty(self, shape: tuple[int, ...], device: str) -> Float4Weight:
        """Uninitialised memory. `shape`: (experts, outputs, inputs)."""
        experts, outputs, inputs = shape
        return Float4Weight.empty(experts, outputs, inputs, device=device)


@dataclass(frozen=True, slots=True)
class StackFormat:
    """How experts side by side are made, but for their size. `of_each`: that of one."""

    of_each: Int4Format | Float8Format

    def empty(self, shape: tuple[int, ...], device: str) -> StackedWeight:
        """Uninitialised memory. `shape`: (experts, outputs, inputs)."""
        how, (experts, outputs, inputs) = self.of_each, shape
        if isinstance(how, Float8Format):
            return Float8Experts.empty(experts, outputs, inputs, blocks=how.blocks, device=device)
        return Int4Experts.empty(experts, outputs, inputs, how.group_size, scale=how.scale, device=device)


WeightFormat = Int4Format | Float8Format | Float4Format | StackFormat


def kept_formats(
    source: WeightSource, config: ModelConfig, keeps: tuple[type[KeptWeight], ...]
) -> dict[str, WeightFormat]:
    """Name of a parameter, or of a stack of experts (`expert_stacks`) → how it is kept. `keeps`: the kernel set's.
    Enters the source, to read in which order inputs lie. Raises `UnsupportedCheckpoint` where that is no order."""
    if not keeps or not isinstance(source, QuantisedSource) or config.storage.transposed:
        return {}
    stored = {canonical_name(name, config): name for name in source.tensors}
    parts: dict[str, list[str | None]] = defaultdict(list)
    for name, target in weight_targets(config).items():
        if target.name.endswith(".weight") and not target.name.startswith("model.embed_"):
            parts[target.name].append(stored.get(name) if target.layout == "rows" else None)
    formats: dict[str, WeightFormat] = {}
    with source:
        for name, names in parts.items():
            modules = [
                None if stored_name is None else source.modules.get(stored_name) for stored_name in names
            ]
            found: WeightFormat | None = _int4(modules) if Int4Weight in keeps else None
            if found is None and Float8Weight in keeps:
                found = _float8(modules)
            if found is not None:
                formats[name] = found
    if Float4Weight in keeps:
        formats |= _float4(source, stored, config)
    return _side_by_side(formats, config, keeps)


def _side_by_side(
    formats: dict[str, WeightFormat], config: ModelConfig, keeps: tuple[type[KeptWeight], ...]
) -> dict[str, WeightFormat]:
    """The same, where experts that are stored alike are stacks. Kernels mix all experts of a model or none: where
    some are kept otherwise, nothing changes."""
    if not config.gated_mlp:
        return formats
    found = dict(formats)
    for name, parts in expert_stacks(config).items():
        how = {found.pop(part, None) for part in parts}
        first = how.pop()
        if how or not (first is None or _stackable(first, keeps)):
            return formats
        if first is not None:
            found[name] = StackFormat(first)
    return found


def _stackable(
    how: WeightFormat, keeps: tuple[type[KeptWeight], ...]
) -> TypeGuard[Int4Format | Float8Format]:
    if isinstance(how, Float8Format):
        return Float8Experts in keeps
    return isinstance(how, Int4Format) and not how.ordered and Int4Experts in keeps


def _float4(
    source: QuantisedSource, stored: Mapping[str | None, str], config: ModelConfig
) -> dict[str, WeightFormat]:
    """Name of a stack → its format. `stored`: canonical name → name in the file. One of another shape than the
    model's is refused later, where all shapes are compared."""
    if not config.gated_mlp:
        return {}
    shapes = parameter_shapes(config)
    formats: dict[str, WeightFormat] = {}
    for name, parts in expert_stacks(config).items():
        module = source.modules.get(stored.get(name.removesuffix(".weight"), ""))
        if isinstance(module, Float4Module) and module.shape == (len(parts), *reversed(shapes[parts[0]])):
            formats[name] = Float4Format()
    return formats


def _int4(parts: Sequence[QuantisedModule | None]) -> Int4Format | None:
    """The format that all parts of a parameter can have together; None: there is none."""
    modules = [part for part in parts if isinstance(part, PackedModule) and part.how.bits == 4]
    if len(modules) < len(parts):
        return None
    first, *others = modules
    if not Int4Weight.fits(first.shape[1], first.group_size):
        return None
    scale, order = first.scale_dtype, first.order()
    if scale == torch.float32:
        return None
    for module in others:
        if module.group_size != first.group_size or module.scale_dtype != scale:
            return None
        other = module.order()
        if (order is None) != (other is None) or (
            order is not None and other is not None and not torch.equal(order, other)
        ):
            return None
    return Int4Format(first.group_size, scale, order is not None)


def _float8(parts: Sequence[QuantisedModule | None]) -> Float8Format | None:
    """The same: a scale for each output, which one for a whole part is, too, or blocks of 128 by 128, where all parts
    but the last have whole blocks. Rows are of whole vectors of 16 bytes."""
    modules = [part for part in parts if isinstance(part, Float8Module)]
    if len(modules) < len(parts) or modules[0].shape[1] % 16:
        return None
    if all(
        module.block[1] == module.shape[1] and module.block[0] in (1, module.shape[0]) for module in modules
    ):
        return Float8Format(blocks=False)
    whole = all(module.shape[0] % BLOCK == 0 for module in modules[:-1])
    if whole and all(module.block == (BLOCK, BLOCK) for module in modules):
        return Float8Format(blocks=True)
    return None
