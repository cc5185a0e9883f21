"""Products with a weight on a CPU, by `matmul.h`: where the library has none that is fast, or none that keeps bits.

Owns when they are the better choice, and the passing of tensors to C. Knows no layer. oneDNN multiplies bf16 well
only where the processor has instructions for it: with AVX-512 alone ours are some four times as fast
(`tests.bench.bench_matmul`). MKL's fp32 products of few rows depend on how many they are; with AVX-512 they are the
faster ones of many rows.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from kernels.weights import PackedWeight

# of the functions in C, by the dtype of the activations
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def operands_fit(x: Tensor, shape: tuple[int, int], bias: Tensor | None) -> bool:
    """Whether x is `[T, in]` with inputs side by side, and the bias `[out]` of its dtype; shape: (out, in)."""
    outputs, inputs = shape
    return (
        x.shape[1] == inputs
        and x.stride(1) == 1
        and (bias is None or (bias.shape == (outputs,) and bias.dtype == x.dtype and bias.is_contiguous()))
    )


class Products:
    """The two operations of the contract, `pack` and `matmul`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        longs, pointers = [c_long] * 3, [c_void_p] * 3
        self._pack, self._matmul = {}, {}
        for dtype, suffix in SUFFIXES.items():
            self._pack[dtype] = pack = getattr(library, f"pack_{suffix}")
            pack.argtypes, pack.restype = (c_long, c_long, c_void_p, c_long, c_void_p, c_int), None
            self._matmul[dtype] = matmul = getattr(library, f"matmul_{suffix}")
            matmul.argtypes = (*longs, c_void_p, c_long, *pointers, c_int)
            matmul.restype = c_int
        self._panel = int(library.panel_outputs())

    def pack(self, weight: Tensor) -> PackedWeight:
        outputs, inputs = weight.shape
        if weight.stride(1) != 1 or weight.dtype not in self._pack:
            raise ValueError("contract broken, pack: weight [out, in] bf16 or fp32, in contiguous")
        words = torch.empty(-(-outputs // self._panel) * self._panel * inputs, dtype=weight.dtype)
        self._pack[weight.dtype](
            outputs, inputs, weight.data_ptr(), weight.stride(0), words.data_ptr(), torch.get_num_threads()
        )
        return PackedWeight((outputs, inputs), words)

    def matmul(self, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
        if isinstance(weight, Tensor):
            weight = self.pack(weight)
        tokens, (outputs, inputs), words = x.shape[0], weight.shape, weight.words
        if x.dtype != words.dtype or not operands_fit(x, weight.shape, bias):
            raise ValueError("contract broken, matmul: x [T, in], weight [out, in], bias [out], of one dtype")
        out = torch.empty((tokens, outputs), dtype=x.dtype)
        failed = self._matmul[x.dtype](
            tokens, outputs, inputs, x.data_ptr(), x.stride(0), words.data_ptr(),
            None if bias is None else bias.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("matmul: no memory for the x of a block of tokens")
        return out


def preferred() -> tuple[torch.dtype, ...]:
    """The dtypes whose products are faster by `Products` than by the library on this processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX2":
        return tuple(SUFFIXES)
    emulated = capability == "AVX512" and not torch.cpu._is_avx512_bf16_supported()
    return (torch.bfloat16,) if emulated else ()
