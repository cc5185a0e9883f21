"""Where weights come from: tensors of a checkpoint by their Hugging Face names, copied a piece at a time.

Owns the way from bytes of a file into rows of a parameter: straight into its memory where nothing has to change, else
through a small buffer of the thread that reads. Knows neither which tensors a model wants nor what they are for
(`weights`). The calling threads read at positions of their own, so any number of them may copy at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.gguf_file import GGUFFile
from engine.quantised_source import QuantisedSource
from engine.safetensors_file import SafetensorsFile, StoredTensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED = {"I32": torch.int32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}


class WeightSource(Protocol):
    """Use as a context; `copy` only inside. `tensors`: name → (shape, bytes in the file), in the file's order."""

    tensors: Mapping[str, tuple[tuple[int, ...], int]]
    piece_bytes: int  # of the file, which one `copy` should take

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def check(self, name: str) -> None:
        """Raises `UnsupportedCheckpoint` for a tensor whose dtype cannot be converted."""
        ...

    def unit(self, name: str) -> int:
        """Rows that must be copied together."""
        ...

    def leave_out(self, name: str) -> bool:
        """Whether a tensor for which the model has no place may be left out. Where its values decide, entering the
        context raises `UnsupportedCheckpoint`."""
        ...

    def copy(self, name: str, start: int, end: int, target: Tensor) -> None:
        """Rows `start` to `end` of the tensor, converted, into a `target` of their shape. Raises
        `UnsupportedCheckpoint`."""
        ...


def open_source(checkpoint: Checkpoint, wanted: Iterable[str]) -> WeightSource:
    """`wanted`: Llama's names of what may be asked for, by which a GGUF's tensors are named; safetensors keep their
    own names. Raises `UnsupportedCheckpoint`, before any weight is read, for a file that is broken and a tensor
    stored twice."""
    if checkpoint.kind == "gguf":
        return _GGUFSource(GGUFFile.open(checkpoint.path), wanted)
    source = _SafetensorsSource([SafetensorsFile.open(path) for path in checkpoint.files])
    if checkpoint.quantisation is None:
        return source
    return QuantisedSource(source, checkpoint.quantisation)


class _SafetensorsSource:
    piece_bytes = 4 * 2**20

    def __init__(self, files: list[SafetensorsFile]) -> None:
        at: dict[str, tuple[Path, StoredTensor]] = {}
        for file in files:
            for name, stored in file.tensors.items():
                if name in at:
                    raise UnsupportedCheckpoint(f"{file.path}: tensor {name} is there twice")
                at[name] = file.path, stored
        self.at: Mapping[str, tuple[Path, StoredTensor]] = at
        self.tensors: Mapping[str, tuple[tuple[int, ...], int]] = {
            name: (stored.shape, stored.num_bytes) for name, (_, stored) in self.at.items()
        }
        self._files = {file.path: -1 for file in files}
        self._open = ExitStack()
        self._buffers = _Buffers()

    def __enter__(self) -> Self:
        for path in self._files:
            self._files[path] = _open(path, self._open)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def check(self, name: str) -> None:
        path, stored = self.at[name]
        if stored.dtype not in _DTYPES:
            raise UnsupportedCheckpoint(
                f"{path}: tensor {name} is stored as {stored.dtype}; allowed: {', '.join(_DTYPES)}. "
                "Quantised weights are read as the quantization_config of config.json says, which leaves this one "
                "out: use the original weights, or a GGUF file of them"
            )

    def unit(self, name: str) -> int:
        return 1

    def leave_out(self, name: str) -> bool:
        return False

    def copy(self, name: str, start: int, end: int, target: Tensor) -> None:
        path, stored = self.at[name]
        row_bytes = stored.num_bytes // stored.shape[0]
        dtype, offset = _DTYPES[stored.dtype], stored.offset + start * row_bytes
        direct = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
        staged = target if direct else self._buffers.take(target, dtype)
        _fill(self._files[path], staged.view(torch.uint8).numpy().data.cast("B"), offset, path)
        if not direct:
            target.copy_(staged)

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows `start` to `end` in new memory, in the dtype in which they are stored: words of integers and floats of
        8 bits, too."""
        path, stored = self.at[name]
        shape, offset = stored.shape, stored.offset
        if shape:
            offset += start * (stored.num_bytes // shape[0])
            shape = ((shape[0] if end is None else end) - start, *shape[1:])
        found = torch.empty(prod(shape), dtype=(_DTYPES | _QUANTISED)[stored.dtype])
        _fill(self._files[path], found.view(torch.uint8).numpy().data.cast("B"), offset, path)
        return found.view(shape)


class _GGUFSource:
    piece_bytes = 2**19  # unpacked up to eight times as large, several arrays of it stay in the cache

    def __init__(self, file: GGUFFile, wanted: Iterable[str]) -> None:
        self._file = file
        self._names = file.names(wanted)
        stored = {name: file.tensors[own] for name, own in self._names.items()}
        self.tensors: Mapping[str, tuple[tuple[int, ...], int]] = {
            name: (info.shape, file.num_bytes(self._names[name])) for name, info in stored.items()
        }
        self._open = ExitStack()
        self._fd = -1

    def __enter__(self) -> Self:
        self._fd = _open(self._file.path, self._open)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def check(self, name: str) -> None:
        """Types are known by their names; what `gguf` cannot unpack is found when it is read."""

    def unit(self, name: str) -> int:
        return self._file.rows_per_head(self._names[name])

    def leave_out(self, name: str) -> bool:
        return False

    def copy(self, name: str, start: int, end: int, target: Tensor) -> None:
        target.copy_(torch.from_numpy(self._file.read(self._fd, self._names[name], start, end)))


class _Buffers(threading.local):
    """One buffer per thread, kept: fresh memory costs more than the copy. Pinned where it feeds a GPU."""

    def __init__(self) -> None:
        self._bytes: Tensor | None = None

    def take(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory of the target's shape in `dtype`, valid until this thread takes again."""
        num_bytes = target.numel() * dtype.itemsize
        if self._bytes is None or self._bytes.numel() < num_bytes:
            pinned = target.device.type == "cuda"
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self._bytes[:num_bytes].view(dtype).view(target.shape)


def _open(path: Path, stack: ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads further ahead
    return fd


def _fill(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Read until `view` is full; the lock of Python is free meanwhile."""
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise UnsupportedCheckpoint(f"{path} ended while it was read: has it been replaced?")
        view, offset = view[count:], offset + count
