"""SafetensorsFile: what tensors one .safetensors file holds and where they lie, checked before any is read.

Owns the header (https://github.com/huggingface/safetensors#format): its length in 8 bytes, then JSON with dtype,
shape and byte range of each tensor. Knows no torch, so that the api and the worker can judge a checkpoint, and no
meaning of names. Parsed here because the library's own reader maps the whole file, and reading through a map faults
page by page: at best half as fast as reading into the parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from engine.model_config import UnsupportedCheckpoint

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
_BITS |= {"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64}


class StoredTensor(NamedTuple):
    dtype: str  # as the format calls it: F32, F16, BF16, …
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """`tensors` are in the order in which they lie in the file."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read the header. Raises `UnsupportedCheckpoint` for a file that is cut short, or whose header cannot be
        read or contradicts itself or the file's length."""
        try:
            return cls(path, _parse(path))
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise UnsupportedCheckpoint(
                f"{path} is not readable: {reason}. Download or copy the file again"
            ) from None


def _parse(path: Path) -> dict[str, StoredTensor]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"the header is cut short, or this is not safetensors ({file_bytes} bytes)")
        header = json.loads(file.read(header_bytes))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    data = 8 + header_bytes
    tensors = {name: _stored(name, entry, data) for name, entry in header.items() if name != "__metadata__"}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)))
    end = data
    for name, tensor in ordered.items():
        if tensor.offset != end:
            raise ValueError(f"tensor {name} does not begin where the one before it ends")
        end += tensor.num_bytes
    if end != file_bytes:
        raise ValueError(f"the header speaks of {end} bytes, the file has {file_bytes}")
    return ordered


def _stored(name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    start, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    dtype = str(entry["dtype"])
    if dtype not in _BITS:
        raise ValueError(f"tensor {name} has an unknown dtype {dtype!r}")
    if min(shape, default=0) < 0 or (end - start) * 8 != prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {name} of {dtype} and shape {shape} cannot have {end - start} bytes")
    return StoredTensor(dtype, shape, data + start, end - start)
