"""StoredTensors: the tensors of a checkpoint as they are stored, which quantised modules are read from.

Owns the checks that the formats share: whether a tensor is there, and whether its dtype and shape are possible. Each
refusal names the file and the tensor. Knows no format (`packed_module`, `float8_module`, `float4_module`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from engine.model_config import UnsupportedCheckpoint
from engine.safetensors_file import StoredTensor

WEIGHTS_AT_ONCE = 2**21  # that are made plain together
SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class StoredTensors(Protocol):
    """A source of plain tensors that also gives raw ones. `tensors` and `copy` are those of a `WeightSource`."""

    tensors: Mapping[str, tuple[tuple[int, ...], int]]
    at: Mapping[str, tuple[Path, StoredTensor]]

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def check(self, name: str) -> None: ...

    def copy(self, name: str, start: int, end: int, target: Tensor) -> None: ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows `start` to `end` in the dtype in which they are stored."""
        ...


def refusal(stored: StoredTensors, name: str, what: str) -> UnsupportedCheckpoint:
    """An error to raise: the file, the tensor and what is wrong with it."""
    return UnsupportedCheckpoint(f"{stored.at[name][0]}: tensor {name} {what}")


def expect(stored: StoredTensors, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> str:
    """The name, of a tensor that is there with one of those dtypes and shapes. Raises `UnsupportedCheckpoint`."""
    if name not in stored.tensors:
        raise UnsupportedCheckpoint(f"tensor {name} of a quantised module is missing")
    found = stored.at[name][1]
    if found.dtype not in dtypes:
        raise refusal(stored, name, f"is stored as {found.dtype}; allowed: {', '.join(dtypes)}")
    if found.shape not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise refusal(stored, name, f"has shape {found.shape}, not {wanted}")
    return name


def matrix_shape(stored: StoredTensors, name: str) -> tuple[int, int]:
    """Rows and columns, neither of them 0. Raises `UnsupportedCheckpoint`."""
    shape, _ = stored.tensors[name]
    if len(shape) != 2 or 0 in shape:
        raise refusal(stored, name, f"has shape {shape}, which is no matrix")
    return shape[0], shape[1]


def rows_at_once(width: int) -> int:
    """How many rows of so many weights are made plain together: at least one."""
    return max(1, WEIGHTS_AT_ONCE // width)
