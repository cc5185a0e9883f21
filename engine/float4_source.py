"""Float4Source: the tensors of an MXFP4 checkpoint, blocks and scales of a layer's experts as one plain tensor.

Owns which stored tensors belong together, their names, shapes and dtypes, and the way from them into parameters, some
million weights at a time. Knows no formula (`dequantise`), and nothing of what a model wants (`weights`). Apart from
`quantised_source`, whose modules are matrices with a `weight` each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import Tensor

from engine.config import UnsupportedCheckpoint
from engine.dequantise import scaled_blocks
from engine.quantisation import Float4Blocks, is_plain
from engine.quantised_source import StoredTensors

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16  # of a block of 32 floats
_WEIGHTS_AT_ONCE = 2**21


class Float4Source:
    """A `WeightSource`. Of E experts, `name_blocks` `[E, out, in / 32, 16]` and `name_scales` `[E, out, in / 32]`,
    both bytes, are the tensor `name` `[E, in, out]`. Raises `UnsupportedCheckpoint` naming a tensor that lacks the
    other, or has a dtype or a shape that it cannot have, before any weight is read."""

    piece_bytes = 2**20

    def __init__(self, stored: StoredTensors, quantisation: Float4Blocks) -> None:
        self._stored = stored
        self._whole: set[str] = set()
        self.tensors: Mapping[str, tuple[tuple[int, ...], int]] = dict(self._named(quantisation))

    def _named(self, quantisation: Float4Blocks) -> list[tuple[str, tuple[tuple[int, ...], int]]]:
        """In the file's order."""
        tensors, found = self._stored.tensors, []
        for name, (shape, num_bytes) in tensors.items():
            whole = name.removesuffix(_BLOCKS)
            if name.endswith(_SCALES) and (blocks := name.removesuffix(_SCALES) + _BLOCKS) not in tensors:
                raise UnsupportedCheckpoint(f"tensor {blocks} of a quantised module is missing")
            if whole == name:
                if not name.endswith(_SCALES):
                    found.append((name, (shape, num_bytes)))
                continue
            if len(shape) != 4 or shape[3] != _BYTES or 0 in shape:
                raise self._error(name, f"has shape {shape}, which is no blocks of {_BYTES} bytes of experts")
            scales = f"{whole}{_SCALES}"
            if scales not in tensors:
                raise UnsupportedCheckpoint(f"tensor {scales} of a quantised module is missing")
            if tensors[scales][0] != shape[:3]:
                raise self._error(scales, f"has shape {tensors[scales][0]}, not {shape[:3]}")
            for part in (name, scales):
                if (dtype := self._stored.at[part][1].dtype) != "U8":
                    raise self._error(part, f"is stored as {dtype}; allowed: U8")
            module = whole.rpartition(".")[0]
            if is_plain(module, quantisation.plain):
                raise self._error(name, f"is quantised, but config.json lists {module} as one that is not")
            if whole in tensors:
                raise self._error(whole, "is there twice, plainly and quantised")
            self._whole.add(whole)
            experts, outputs, groups, _ = shape
            found.append((whole, ((experts, groups * 2 * _BYTES, outputs), num_bytes + tensors[scales][1])))
        return found

    def __enter__(self) -> Self:
        self._stored.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.__exit__()

    def check(self, name: str) -> None:
        if name not in self._whole:
            self._stored.check(name)

    def unit(self, name: str) -> int:
        return 1

    def leave_out(self, name: str) -> bool:
        return False

    def copy(self, name: str, start: int, end: int, target: Tensor) -> None:
        if name not in self._whole:
            return self._stored.copy(name, start, end, target)
        blocks, scales = (self._stored.read(f"{name}{part}", start, end) for part in (_BLOCKS, _SCALES))
        together = max(1, _WEIGHTS_AT_ONCE // target.shape[1])
        for expert in range(end - start):
            for first in range(0, target.shape[2], together):
                some = slice(first, first + together)
                made = scaled_blocks(blocks[expert, some], scales[expert, some])  # [outputs, inputs]
                target[expert, :, some].copy_(made.t())

    def _error(self, name: str, what: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(f"{self._stored.at[name][0]}: tensor {name} {what}")
