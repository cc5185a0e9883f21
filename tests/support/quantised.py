"""Quantised checkpoints written out of plain ones, weight by weight, as the formats' papers and tools describe them.

Owns a plain implementation of each format, in loops over single weights, that shares nothing with the engine's;
beside the stored tensors it gives the weights that they stand for, in fp32. `write` makes two folders: the quantised
checkpoint, and the same weights stored plainly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]
# a weight → its tensors, and what they stand for
Quantiser = Callable[[np.ndarray], tuple[Parts, np.ndarray]]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WEIGHTS = "model.safetensors"


def _integers(
    weight: np.ndarray, group_of: list[int], bits: int, symmetric: bool, scale: type[np.floating] = np.float16
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """weight `[out, in]` → integers `[in, out]`, zeros and scales `[groups, out]`, and the fp32 weights."""
    outputs, inputs = weight.shape
    groups, most = max(group_of) + 1, 2**bits - 1
    zeros, scales = np.zeros((groups, outputs), np.int64), np.zeros((groups, outputs), scale)
    for group in range(groups):
        members = [i for i in range(inputs) if group_of[i] == group]
        for o in range(outputs):
            low, high = min(0.0, weight[o, members].min()), max(0.0, weight[o, members].max())
            if symmetric:
                high = max(-low, high)
                low = -high
            scales[group, o] = scale((high - low) / most)
            middle = (most + 1) // 2 if symmetric else round(-low / float(scales[group, o]))
            zeros[group, o] = min(max(middle, 1), most)
    stored, plain = np.zeros((inputs, outputs), np.int64), np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
        for o in range(outputs):
            zero, step = int(zeros[group_of[i], o]), np.float32(scales[group_of[i], o])
            stored[i, o] = min(max(round(float(weight[o, i] / step)) + zero, 0), most)
            plain[o, i] = np.float32(int(stored[i, o]) - zero) * step
    return stored, zeros, scales, plain


def _words(rows: list[list[int]], bits: int) -> Tensor:
    """Each row's integers, the first in the lowest bits, as one word of 32 bits per 32 / `bits` of them."""
    count = 32 // bits
    made = []
    for row in rows:
        words = [row[at : at + count] for at in range(0, len(row), count)]
        made.append([sum(value << (bits * place) for place, value in enumerate(word)) for word in words])
    return torch.from_numpy(np.array(made, np.uint64).astype(np.uint32).view(np.int32).copy())


def awq(group_size: int) -> Quantiser:
    def quantise(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        inputs = weight.shape[1]
        size = inputs if group_size == -1 else group_size
        integers, zeros, scales, plain = _integers(weight, [i // size for i in range(inputs)], 4, False)

        def ordered(matrix: np.ndarray) -> Tensor:
            rows = [
                [int(row[at + place]) for at in range(0, len(row), 8) for place in _AWQ_ORDER]
                for row in matrix
            ]
            return _words(rows, 4)

        return {
            "qweight": ordered(integers),
            "qzeros": ordered(zeros),
            "scales": torch.from_numpy(scales),
        }, plain

    return quantise


def gptq(
    group_size: int,
    *,
    bits: int = 4,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
    scale: type[np.floating] = np.float16,
) -> Quantiser:
    def quantise(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        inputs = weight.shape[1]
        size = inputs if group_size == -1 else group_size
        order = np.random.default_rng(inputs).permutation(inputs) if act_order else np.arange(inputs)
        group_of = [0] * inputs
        for place, i in enumerate(order):
            group_of[i] = place // size
        integers, zeros, scales, plain = _integers(weight, group_of, bits, symmetric, scale)
        parts = {
            "qweight": _words(integers.T.tolist(), bits).t().contiguous(),
            "qzeros": _words((zeros - (1 if version == 1 else 0)).tolist(), bits),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
        }
        return parts, plain

    return quantise


def float8(
    rows: int | None, columns: int | None, scale: str, *, dtype: torch.dtype = torch.float32, dims: int = 2
) -> Quantiser:
    """`rows`, `columns`: of a block with one scale; None: all. `dims`: of the stored scales."""

    def quantise(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        outputs, inputs = weight.shape
        high, wide = rows or outputs, columns or inputs
        stored, plain = torch.zeros(outputs, inputs, dtype=torch.float8_e4m3fn), np.zeros_like(weight)
        scales = torch.zeros(-(-outputs // high), -(-inputs // wide), dtype=dtype)
        for a in range(0, outputs, high):
            for b in range(0, inputs, wide):
                block = weight[a : a + high, b : b + wide]
                scales[a // high, b // wide] = float(np.abs(block).max()) / 448
                one = np.float32(float(scales[a // high, b // wide]))
                floats = torch.from_numpy(block / one).clamp(-448, 448).to(torch.float8_e4m3fn)
                stored[a : a + high, b : b + wide] = floats
                plain[a : a + high, b : b + wide] = floats.float().numpy() * one
        shape = scales.shape[:dims] if dims else ()
        return {"weight": stored, scale: scales.reshape(shape)}, plain

    return quantise


def write(
    folder: Path,
    quantiser: Quantiser,
    config: Mapping[str, Any],
    *,
    keep: tuple[str, ...] = ("lm_head", ".gate."),
) -> tuple[Path, Path]:
    """The plain checkpoint in `folder` (one file of fp32) → two folders: quantised with that `quantization_config`,
    and of the same weights stored plainly. Matrices of layers are quantised, but for those with one of `keep` in
    their names."""
    quantised, plain = folder.with_name("quantised"), folder.with_name("plain")
    shutil.copytree(folder, quantised)
    shutil.copytree(folder, plain)
    packed, unpacked = {}, {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        packed[name] = unpacked[name] = tensor
        if tensor.dim() != 2 or ".layers." not in name or any(part in name for part in keep):
            continue
        del packed[name]
        parts, weight = quantiser(tensor.float().numpy())
        packed |= {f"{name.removesuffix('weight')}{part}": found for part, found in parts.items()}
        unpacked[name] = torch.from_numpy(weight)
    save_file(packed, quantised / WEIGHTS, {"format": "pt"})
    save_file(unpacked, plain / WEIGHTS, {"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(told | {"quantization_config": dict(config)}))
    return quantised, plain
