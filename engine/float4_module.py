"""Float4Module: all experts of a layer whose weights are floats of 4 bits in blocks with a scale each (MXFP4).

Owns the names, shapes and dtypes of their tensors and the way from them into plain experts, some million weights at a
time, or into experts that stay in 4 bits. Knows no formula (`dequantise`), and nothing of what a model wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.dequantise import scaled_blocks
from engine.model_config import UnsupportedCheckpoint
from engine.stored_tensors import StoredTensors, expect, refusal, rows_at_once
from kernels.weights import Float4Weight, KeptWeight

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block of 32 floats


def float4_module(stored: StoredTensors, name: str) -> Float4Module | None:
    """The module whose blocks of E experts the tensor `name` holds; None where it holds none.

    `x_blocks` `[E, out, in / 32, 16]` and `x_scales` `[E, out, in / 32]`, both bytes, are the tensor `x`
    `[E, in, out]`. Raises `UnsupportedCheckpoint` naming a tensor that lacks the other, or has a dtype or a shape
    that it cannot have.
    """
    if name.endswith(_SCALES) and (blocks := name.removesuffix(_SCALES) + _BLOCKS) not in stored.tensors:
        raise UnsupportedCheckpoint(f"tensor {blocks} of a quantised module is missing")
    if not name.endswith(_BLOCKS):
        return None
    tensor, (shape, _) = name.removesuffix(_BLOCKS), stored.tensors[name]
    if len(shape) != 4 or shape[3] != _BYTES or 0 in shape:
        raise refusal(stored, name, f"has shape {shape}, which is no blocks of {_BYTES} bytes of experts")
    scales = expect(stored, f"{tensor}{_SCALES}", ("U8",), shape[:3])
    expect(stored, name, ("U8",), shape)
    experts, outputs, groups, _ = shape
    whole = (experts, groups * 2 * _BYTES, outputs)
    return Float4Module(stored, tensor, whole, {"blocks": name, "scales": scales})


@dataclass(frozen=True, slots=True)
class Float4Module:
    """A `QuantisedModule`, whose rows are experts."""

    stored: StoredTensors
    tensor: str
    shape: tuple[int, int, int]  # of the plain tensor: experts, inputs, outputs
    parts: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.tensor.rpartition(".")[0]

    @property
    def unit(self) -> int:
        return 1

    def copy(self, start: int, end: int, target: Tensor) -> None:
        """Experts `start` to `end` into a `target` `[end - start, in, out]`."""
        blocks, scales = self._read(start, end)
        together = rows_at_once(target.shape[1])
        for expert in range(end - start):
            for first in range(0, target.shape[2], together):
                some = slice(first, first + together)
                made = scaled_blocks(blocks[expert, some], scales[expert, some])  # [outputs, inputs]
                target[expert, :, some].copy_(made.t())

    def keep(self, start: int, end: int, target: KeptWeight) -> None:
        """Experts `start` to `end` as they are stored, into a `Float4Weight` of so many."""
        assert isinstance(target, Float4Weight)
        target.put(*self._read(start, end))

    def _read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Blocks `[n, out, in / 32, 16]` and scales `[n, out, in / 32]`, uint8."""
        blocks, scales = (self.stored.read(self.parts[part], start, end) for part in ("blocks", "scales"))
        return blocks, scales
