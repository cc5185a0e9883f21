"""The `cpu` set: `ops.c`, compiled on first use, behind the contract of `kernels`.

Owns the passing of tensors to C: shapes, strides and types are checked here because C cannot. bf16 and fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from kernels import Kernels
from kernels.cpu.build import BuildError, load_library

__all__ = ["BuildError", "kernels"]

_L, _P, _F, _I = c_long, c_void_p, c_float, c_int
_ARGUMENTS = {
    "rms_norm": (_L, _L, _P, _L, _P, _L, _P, _F, _P, _I),
    "rope": (_L, _L, _L, _L, _P, _L, _P, _L, _P, _P, _I),
    "store_kv": (_L, _L, _L, _L, _P, _L, _P, _L, _P, _P, _P, _I),
    "silu_mul": (_L, _L, _P, _L, _P, _I),
    "paged_attention": (_L, _L, _L, _L, _L, _P, _L, _P, _P, _P, _L, _P, _P, _F, _P, _I),
}
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}

Table = dict[torch.dtype, Callable[..., Any]]


def kernels() -> Kernels:
    """Compile or load the library. Raises `BuildError` when there is no working C compiler."""
    library = load_library()
    ops = _Ops(**{name: _functions(library, name) for name in _ARGUMENTS})
    return Kernels(
        name="cpu",
        rms_norm=ops.rms_norm,
        add_rms_norm=ops.add_rms_norm,
        rope=ops.rope,
        store_kv=ops.store_kv,
        silu_mul=ops.silu_mul,
        paged_attention=ops.paged_attention,
    )


def _functions(library: ctypes.CDLL, name: str) -> Table:
    table: Table = {}
    for dtype, suffix in _SUFFIXES.items():
        function = getattr(library, f"{name}_{suffix}")
        function.argtypes = _ARGUMENTS[name]
        function.restype = c_int if name == "paged_attention" else None
        table[dtype] = function
    return table


class _Ops:
    """One method per operation of the contract; each finds its C function by dtype."""

    def __init__(self, **tables: Table) -> None:
        self._rms_norm = tables["rms_norm"]
        self._rope = tables["rope"]
        self._store_kv = tables["store_kv"]
        self._silu_mul = tables["silu_mul"]
        self._paged_attention = tables["paged_attention"]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        tokens, width = x.shape
        _require(x.stride(1) == 1 and weight.shape == (width,), "rms_norm: x [T, H], weight [H]")
        _same_dtype(x, weight)
        out = torch.empty((tokens, width), dtype=x.dtype)
        self._rms_norm[x.dtype](
            tokens, width, x.data_ptr(), x.stride(0), None, 0,
            weight.data_ptr(), eps, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        tokens, width = x.shape
        _require(
            x.shape == residual.shape and weight.shape == (width,) and x.stride(1) == residual.stride(1) == 1,
            "add_rms_norm: x and residual [T, H], weight [H]",
        )
        _same_dtype(x, residual, weight)
        out = torch.empty((tokens, width), dtype=x.dtype)
        self._rms_norm[x.dtype](
            tokens, width, x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0),
            weight.data_ptr(), eps, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out, residual

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        _require(
            _rows(q) and _rows(k) and k.shape == (tokens, kv_heads, dim), "rope: q [T, hq, d], k [T, hk, d]"
        )
        _require(
            cos.shape == sin.shape == (tokens, dim // 2)
            and cos.dtype == sin.dtype == torch.float32
            and cos.is_contiguous()
            and sin.is_contiguous(),
            "rope: cos and sin [T, d/2] fp32",
        )
        _same_dtype(q, k)
        self._rope[q.dtype](
            tokens, heads, kv_heads, dim, q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0),
            cos.data_ptr(), sin.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        tokens, kv_heads, dim = k.shape
        page_size = _page_size(k_cache, v_cache, kv_heads, dim)
        _require(_rows(k) and _rows(v) and v.shape == k.shape, "store_kv: k and v [T, hk, d]")
        _require(slots.dtype == torch.int64 and slots.shape == (tokens,), "store_kv: slots [T] int64")
        _same_dtype(k, v, k_cache, v_cache)
        self._store_kv[k.dtype](
            tokens, kv_heads, dim, page_size, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        _require(gate_up.stride(1) == 1 and gate_up.shape[1] % 2 == 0, "silu_mul: gate_up [T, 2I]")
        out = torch.empty((tokens, width), dtype=gate_up.dtype)
        self._silu_mul[gate_up.dtype](
            tokens, width, gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), torch.get_num_threads()
        )
        return out

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        scale: float,
    ) -> Tensor:
        tokens, heads, dim = q.shape
        rows, kv_heads = page_table.shape[0], k_cache.shape[1]
        page_size = _page_size(k_cache, v_cache, kv_heads, dim)
        _require(_rows(q) and heads % kv_heads == 0, "paged_attention: q [T, hq, d], hq a multiple of hk")
        _require(
            page_table.dtype == query_start.dtype == context_lens.dtype == torch.int32
            and query_start.shape == (rows + 1,)
            and context_lens.shape == (rows,)
            and page_table.is_contiguous(),
            "paged_attention: page_table [R, P], query_start [R+1], context_lens [R], all int32",
        )
        _same_dtype(q, k_cache, v_cache)
        out = torch.empty((tokens, heads, dim), dtype=q.dtype)
        covered = int(query_start[-1])
        if covered < tokens:
            out[covered:].zero_()
        failed = self._paged_attention[q.dtype](
            rows, kv_heads, heads // kv_heads, dim, page_size, q.data_ptr(), q.stride(0),
            k_cache.data_ptr(), v_cache.data_ptr(), page_table.data_ptr(), page_table.shape[1],
            query_start.data_ptr(), context_lens.data_ptr(), scale, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("paged_attention: no memory for its list of work items")
        return out


def _rows(x: Tensor) -> bool:
    """True when only the token rows are strided."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _page_size(k_cache: Tensor, v_cache: Tensor, kv_heads: int, dim: int) -> int:
    page_size = k_cache.shape[3]
    _require(
        k_cache.shape[1:] == (kv_heads, dim, page_size)
        and v_cache.shape == (k_cache.shape[0], kv_heads, page_size, dim)
        and page_size % 16 == 0
        and k_cache.is_contiguous()
        and v_cache.is_contiguous(),
        "k_cache [pages, hk, d, page_size], v_cache [pages, hk, page_size, d], page_size a multiple of 16",
    )
    return page_size


def _same_dtype(*tensors: Tensor) -> None:
    dtype = tensors[0].dtype
    _require(all(tensor.dtype == dtype for tensor in tensors), "all tensors must share one dtype")


def _require(held: bool, contract: str) -> None:
    if not held:
        raise ValueError(f"contract broken, {contract}")
