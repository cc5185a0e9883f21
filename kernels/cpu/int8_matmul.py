"""Products with weights of 8-bit integers on a CPU, by `matmul_i8.h`.

Owns the passing of tensors to C. Knows no layer and no checkpoint.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from kernels.cpu.matmul import SUFFIXES, operands_fit
from kernels.weights import Int8Weight, rounded_to_int8


class IntegerProducts:
    """The two operations of the contract, `quantise_int8` and `int8_matmul`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._pack = library.pack_i8
        self._pack.argtypes, self._pack.restype = (c_long, c_long, c_void_p, c_void_p, c_int), None
        self._matmul = {}
        for dtype, suffix in SUFFIXES.items():
            self._matmul[dtype] = matmul = getattr(library, f"matmul_i8_{suffix}")
            matmul.argtypes = (*[c_long] * 3, c_void_p, c_long, *[c_void_p] * 4, c_int)
            matmul.restype = c_int
        self._panel = int(library.panel_outputs())

    def quantise(self, weight: Tensor) -> Int8Weight:
        outputs, inputs = weight.shape
        integers, scales = rounded_to_int8(weight)
        panels, pairs = -(-outputs // self._panel), -(-inputs // 2)
        words = torch.empty(panels * self._panel * pairs * 2, dtype=torch.int8)
        self._pack(outputs, inputs, integers.data_ptr(), words.data_ptr(), torch.get_num_threads())
        return Int8Weight((outputs, inputs), words, scales)

    def matmul(self, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        tokens, (outputs, inputs) = x.shape[0], weight.shape
        if x.dtype not in self._matmul or not operands_fit(x, weight.shape, bias):
            raise ValueError("contract broken, int8_matmul: x [T, in] bf16 or fp32, bias [out] of its dtype")
        out = torch.empty((tokens, outputs), dtype=x.dtype)
        failed = self._matmul[x.dtype](
            tokens, outputs, inputs, x.data_ptr(), x.stride(0), weight.words.data_ptr(),
            weight.scales.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("int8_matmul: no memory for the x of a block of tokens")
        return out
