"""GGUFFile: the metadata and tensors of a llama.cpp checkpoint, under Hugging Face names.

Owns the GGUF container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and the way back from
llama.cpp's conventions: tensor names, the row permutation of q and k. Knows no torch, and no meaning of keys
(`gguf_families`). The header is parsed here rather than by the `gguf` package, whose reader needs two seconds for the
vocabulary alone; that package is imported for its names, its sizes and to dequantise.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.gguf_families import ROPE_FACTORS, gguf_config, gguf_family
from engine.model_config import ModelConfig, UnsupportedCheckpoint

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_F32 = 0


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]  # in numpy's order: rows first
    type_id: int  # GGMLQuantizationType
    offset: int  # of the first byte, from the start of the file


@dataclass(frozen=True, slots=True)
class GGUFFile:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Parse the header (about 0.1 s for 50,000 tokens). Raises `UnsupportedCheckpoint` on a bad file."""
        try:
            with path.open("rb") as file:
                data = np.memmap(file, mode="r")
            metadata, tensors = _Header(memoryview(data.data)).parse()
        except (struct.error, ValueError, IndexError, KeyError, OverflowError) as error:
            raise UnsupportedCheckpoint(f"{path}: not a readable GGUF file: {error}") from None
        found = cls(path, metadata, tensors)
        for name, info in tensors.items():
            if info.offset + found.num_bytes(name) > data.size:
                raise UnsupportedCheckpoint(f"{path} is cut short: tensor {name} lies beyond its end")
        return found

    def model_config(self) -> ModelConfig:
        """Sizes and flags. Raises `UnsupportedCheckpoint` naming the key that is missing or not supported."""
        shapes = {name: info.shape for name, info in self.tensors.items()}
        try:
            return gguf_config(self.metadata, shapes, self._rope_factors)
        except UnsupportedCheckpoint as error:
            raise UnsupportedCheckpoint(f"{self.path}: {error}") from None

    def names(self, wanted: Iterable[str]) -> dict[str, str]:
        """Hugging Face name → name here, of those `wanted` that are here, in the order of the file.

        Raises `UnsupportedCheckpoint` for a tensor that nobody wants.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = self.metadata["general.architecture"]
        (number,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
        known = get_tensor_name_map(number, int(self.metadata[f"{architecture}.block_count"]))
        theirs = {known.get_name(name, try_suffixes=(".weight", ".bias")): name for name in wanted}
        for name in self.tensors:
            if name not in theirs and name != ROPE_FACTORS:
                raise UnsupportedCheckpoint(f"{self.path}: tensor {name} is not known")
        in_file = sorted(self.tensors, key=lambda name: self.tensors[name].offset)
        return {theirs[name]: name for name in in_file if name in theirs}

    def num_bytes(self, name: str) -> int:
        """What a tensor occupies in the file. Raises `UnsupportedCheckpoint` for a type that is not known."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        info = self.tensors[name]
        try:
            per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.type_id)]
        except ValueError:
            raise UnsupportedCheckpoint(
                f"{self.path}: tensor {name} has the unknown type {info.type_id}"
            ) from None
        whole_rows = len(info.shape) > 1 or per_block == 1
        if not whole_rows or not info.shape or info.shape[-1] % per_block:
            raise UnsupportedCheckpoint(
                f"{self.path}: tensor {name} of shape {info.shape} has no whole blocks"
            )
        return prod(info.shape) // per_block * int(block_bytes)

    def rows_per_head(self, name: str) -> int:
        """Rows that `read` must give together: one head's where they are permuted, else 1."""
        part = name.split(".")[-2]
        if not gguf_family(self.metadata).interleaved or part not in ("attn_q", "attn_k"):
            return 1
        prefix = f"{self.metadata['general.architecture']}.attention.head_count"
        num_heads = self.metadata[prefix]
        if part == "attn_k":
            num_heads = self.metadata.get(f"{prefix}_kv") or num_heads
        return self.tensors[name].shape[0] // int(num_heads)

    def read(self, fd: int, name: str, start: int, end: int) -> NDArray[np.float32]:
        """Rows `start` to `end` of a tensor, dequantised, through an open descriptor of this file; for any number of
        threads. Raises `UnsupportedCheckpoint` for a quantisation that the `gguf` package cannot undo."""
        from gguf import GGMLQuantizationType, dequantize

        info = self.tensors[name]
        row_bytes = self.num_bytes(name) // info.shape[0]
        wanted, offset = (end - start) * row_bytes, info.offset + start * row_bytes
        raw = os.pread(fd, wanted, offset)
        if len(raw) != wanted:
            raise UnsupportedCheckpoint(f"{self.path} ended while it was read: has it been replaced?")
        shape = (end - start, *info.shape[1:])
        if info.type_id == _F32:
            array: NDArray[np.float32] = np.frombuffer(bytearray(raw), np.float32).reshape(shape)
        else:
            blocks = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1)
            try:
                array = dequantize(blocks, GGMLQuantizationType(info.type_id)).astype(np.float32, copy=False)
            except NotImplementedError as error:
                raise UnsupportedCheckpoint(f"{self.path}: tensor {name}: {error}") from None
        unit = self.rows_per_head(name)
        return array if unit == 1 else _uninterleaved(array, unit)

    def _rope_factors(self) -> NDArray[np.float32]:
        with self.path.open("rb") as file:
            return self.read(file.fileno(), ROPE_FACTORS, 0, self.tensors[ROPE_FACTORS].shape[0])


def _uninterleaved(array: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows `[heads · d, …]` in which each head's two halves alternate → the first half, then the second."""
    split = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(array.shape)


class _Header:
    """One pass over the header bytes; every read past the end raises."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if bytes(self.view[:4]) != b"GGUF":
            raise ValueError("the magic number is missing")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported (little-endian 2 and 3 are)")
        num_tensors, num_keys = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        found: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            name = self.string()
            shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))[::-1]
            found[name] = TensorInfo(shape, self.scalar("I"), self.scalar("Q"))
        align = int(metadata.get("general.alignment", 32))
        data = -(-self.at // align) * align
        for name, info in found.items():
            found[name] = info._replace(offset=info.offset + data)
        return metadata, found

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.view, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.view, self.at)
        start = self.at + 8
        self.at = start + length
        if self.at > len(self.view):
            raise ValueError("a string runs past the end of the file")
        return str(self.view[start : self.at], "utf-8", "replace")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            return self.scalar(_SCALARS[type_id])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in (_STRING, _ARRAY):
            return [self.value(item) for _ in range(count)]
        array = np.frombuffer(self.view, np.dtype("<" + _SCALARS[item]), count, self.at)
        self.at += array.nbytes
        return array.tolist()
