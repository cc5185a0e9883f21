"""Float8Module: a module whose weights are floats of 8 bits (E4M3) with scales (FP8 and compressed-tensors).

Owns the names, shapes and dtypes of its tensors and the way from them into a plain weight, some million weights at a
time, or into one that stays in 8 bits. Knows no formula (`dequantise`), and nothing of what a model wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.dequantise import scaled_floats
from engine.quantisation import Float8
from engine.stored_tensors import SCALE_DTYPES, StoredTensors, expect, matrix_shape, rows_at_once
from kernels.weights import Float8Weight, KeptWeight

# Scales of activations, for kernels that quantise those, too; nothing here reads them
_OF_ACTIVATIONS = ("input_scale", "activation_scale")


def float8_module(stored: StoredTensors, how: Float8, name: str) -> Float8Module | None:
    """The module whose floats of 8 bits the tensor `name` holds; None where it holds none. Raises
    `UnsupportedCheckpoint` naming a scale that is missing, or has a dtype or a shape that it cannot have."""
    module, _, kind = name.rpartition(".")
    if kind != "weight" or stored.at[name][1].dtype != "F8_E4M3":
        return None
    outputs, inputs = matrix_shape(stored, name)
    block = how.block[0] or outputs, how.block[1] or inputs
    shape = (-(-outputs // block[0]), -(-inputs // block[1]))
    also: tuple[tuple[int, ...], ...] = () if how.block[1] else (shape[:1],)  # without the axis of inputs
    if how.block == (None, None):
        also = (*also, ())
    names = [f"{module}.{scale}" for scale in how.scale_names]
    scale = next((one for one in names if one in stored.tensors), names[0])
    parts = {"weight": name, "scale": expect(stored, scale, tuple(SCALE_DTYPES), shape, *also)}
    for kind in _OF_ACTIVATIONS:
        if f"{module}.{kind}" in stored.tensors:
            parts[kind] = f"{module}.{kind}"
    return Float8Module(stored, module, (outputs, inputs), parts, block)


@dataclass(frozen=True, slots=True)
class Float8Module:
    """A `QuantisedModule`."""

    stored: StoredTensors
    name: str
    shape: tuple[int, int]  # of the plain weight: outputs, inputs
    parts: Mapping[str, str]
    block: tuple[int, int]  # outputs and inputs that share a scale

    @property
    def tensor(self) -> str:
        return f"{self.name}.weight"

    @property
    def unit(self) -> int:
        return 1

    def copy(self, start: int, end: int, target: Tensor) -> None:
        """Rows `start` to `end` into a `target` `[end - start, in]`."""
        scales = self._scales()
        together = rows_at_once(self.shape[1])
        for first in range(0, target.shape[0], together):
            piece = target[first : first + together]
            floats = self._floats(start + first, start + first + piece.shape[0])
            piece.copy_(scaled_floats(floats, scales, self.block, start + first))

    def keep(self, start: int, end: int, target: KeptWeight) -> None:
        """Rows `start` to `end` as they are stored, into a `Float8Weight` of the whole module's shape."""
        assert isinstance(target, Float8Weight)
        target.floats[start:end].copy_(self._floats(start, end))
        if start == 0:
            scales = self._scales()
            target.scales.copy_(scales if target.blocks else scales.expand(self.shape[0], 1)[:, 0])

    def _floats(self, start: int, end: int) -> Tensor:
        return self.stored.read(self.parts["weight"], start, end)

    def _scales(self) -> Tensor:
        """`[blocks of outputs, blocks of inputs]` fp32."""
        (outputs, inputs), block = self.shape, self.block
        scales = self.stored.read(self.parts["scale"]).float()
        return scales.view(-(-outputs // block[0]), -(-inputs // block[1]))
