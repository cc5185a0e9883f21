"""Triton's interpreter, with its arithmetic repaired.

The interpreter runs kernels on a CPU, in numpy, which has no bfloat16 and no fp8. It keeps such values as unsigned
integers: it cuts fp32 to bfloat16 instead of rounding, subtracts and multiplies bfloat16 and matrices of it as if
they were integers, and converts small integers to the wrong bits (seen in triton 3.6 and 3.7). Here torch converts,
and matrices are multiplied in fp32, every row by the same order of sums, as on a GPU. Overflow and NaN, which
kernels rely on, warn no more. Nothing else is changed, and nothing at all where kernels are compiled.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}


def repair() -> None:
    """Once, before any kernel runs."""
    whole_cast, whole_run = InterpreterBuilder.cast_impl, GridExecutor.__call__
    whole_sub, whole_mul = InterpreterBuilder.create_fsub, InterpreterBuilder.create_fmul

    def cast(self: Any, value: Any, target: Any) -> Any:
        source, wanted = value.dtype.scalar, target.scalar
        if source not in _NARROW and wanted not in _NARROW:
            return whole_cast(self, value, target)
        data = _rounded(_wide(value), wanted) if wanted in _NARROW else _wide(value)
        if wanted in _NARROW or wanted == tl.float32:
            return TensorHandle(data, wanted)
        return whole_cast(self, TensorHandle(data, tl.float32), target)

    def cast_of_8_bits(self: Any, value: Any, target: Any, _: Any) -> Any:
        return cast(self, value, target)  # to nearest even, the only rounding that torch and we know

    def sub(self: Any, a: Any, b: Any) -> Any:
        wanted = a.dtype.scalar
        if wanted not in _NARROW:
            return whole_sub(self, a, b)
        return TensorHandle(_rounded(_wide(a) - _wide(b), wanted), wanted)

    def mul(self: Any, a: Any, b: Any) -> Any:
        wanted = a.dtype.scalar
        if wanted not in _NARROW:
            return whole_mul(self, a, b)
        return TensorHandle(_rounded(_wide(a) * _wide(b), wanted), wanted)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        # not by BLAS, where a row's bits depend on which row it is
        return TensorHandle(np.einsum("mk,kn->mn", _wide(a), _wide(b)) + d.data, d.dtype.scalar)

    def run(self: Any, *args: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return whole_run(self, *args, **options)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = cast_of_8_bits
    InterpreterBuilder.create_fsub = sub
    InterpreterBuilder.create_fmul = mul
    InterpreterBuilder.create_dot = dot
    GridExecutor.__call__ = run


def _wide(value: Any) -> Any:
    """What a handle means, in fp32."""
    dtype = _NARROW.get(value.dtype.scalar)
    if dtype is None:
        return value.data.astype(np.float32)
    bits = torch.from_numpy(np.ascontiguousarray(value.data))
    return bits.view(dtype).float().numpy().reshape(value.data.shape)


def _rounded(wide: Any, wanted: Any) -> Any:
    """The bits of fp32 values in a narrow dtype, rounded to nearest even."""
    shape, narrow = wide.shape, torch.from_numpy(np.ascontiguousarray(wide)).to(_NARROW[wanted])
    return narrow.view(torch.uint8 if wanted == tl.float8e4nv else torch.uint16).numpy().reshape(shape)
