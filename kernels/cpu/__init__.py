"""The `cpu` set: `ops.c`, compiled on first use, behind the contract of `kernels`.

Owns the passing of tensors to C, whose shapes, strides and types are checked before (`tensors`). bf16 and fp32,
with caches of the same dtype or of int8. Sampling is C too (`sampling`), but for fp16 logits; penalties, logprobs,
look-ups and the way from step to step are the reference set's. Products are the set's own (`matmul`) where the
library's are slow, and then a decoder's blocks may be one call (`blocks`); those with quantised weights are the
reference set's, and are not used: on a CPU such weights are made plain when they are loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import c_float, c_int, c_long, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import (
    Activation,
    Attention,
    GatedActivation,
    Kernels,
    PagedKV,
    SharedPrefixes,
    Sharing,
)
from kernels.cpu.blocks import Fusing
from kernels.cpu.build import BuildError, load_library
from kernels.cpu.int8_matmul import IntegerProducts
from kernels.cpu.matmul import SUFFIXES, Products, preferred
from kernels.cpu.sampling import Sampling
from kernels.cpu.tensors import (
    ACTIVATIONS,
    PAGED_SUFFIXES,
    dtypes_of,
    groups_of,
    page_size_of,
    pointers_of,
    require,
    require_per_head,
    require_rows,
    rows_only,
    same_dtype,
    single_queries,
)
from kernels.reference import (
    advance,
    attend_with_single_queries,
    count_tokens,
    fp8_matmul,
    int4_matmul,
    look_up,
    normalisers,
    penalise,
)

__all__ = ["BuildError", "kernels"]

_L, _P, _F, _I = c_long, c_void_p, c_float, c_int
_ARGUMENTS = {
    "rms_norm": (_L, _L, _P, _L, _P, _L, _P, _F, _F, _P, _I),
    "rope": (_L, _L, _L, _L, _P, _L, _L, _P, _L, _L, _P, _P, _I),
    "layer_norm": (_L, _L, _P, _L, _P, _L, _P, _P, _F, _P, _I),
    "act": (_L, _L, _P, _P, _L, _P, _I, _I),
    "softcap": (_L, _L, _P, _L, _F, _P, _I),
}
_PAGED_ARGUMENTS = {
    "store_kv": (_L, _L, _L, _L, _P, _L, _P, _L, _P, _P, _P, _P, _P, _I),
    "paged_attention": (
        *(_L, _L, _L, _L, _L, _P, _L, _P, _P, _P, _P, _P, _L, _P, _P, _F, _L, _F, _P),
        *(_P, _P, _P, _P, _L, _P, _I),
    ),
}

Table = dict[Any, Callable[..., Any]]


def kernels() -> Kernels:
    """Compile or load the library. Raises `BuildError` when there is no working C compiler."""
    library = load_library()
    tables = {name: _functions(library, name, types, SUFFIXES) for name, types in _ARGUMENTS.items()}
    for name, types in _PAGED_ARGUMENTS.items():
        tables[name] = _functions(library, name, types, PAGED_SUFFIXES)
    ops, products, integers = _Ops(**tables), Products(library), IntegerProducts(library)
    return Kernels(
        name="cpu",
        quantised=(torch.int8,),
        rms_norm=ops.rms_norm,
        add_rms_norm=ops.add_rms_norm,
        rope=ops.rope,
        store_kv=ops.store_kv,
        layer_norm=ops.layer_norm,
        add_layer_norm=ops.add_layer_norm,
        act=ops.act,
        act_mul=ops.act_mul,
        softcap=ops.softcap,
        paged_attention=ops.paged_attention,
        sample=Sampling(library).sample,
        normalisers=normalisers,
        penalise=penalise,
        count_tokens=count_tokens,
        look_up=look_up,
        advance=advance,
        int4_matmul=int4_matmul,
        fp8_matmul=fp8_matmul,
        matmul=products.matmul,
        pack=products.pack,
        multiplies=preferred(),
        quantise_int8=integers.quantise,
        int8_matmul=integers.matmul,
        fuse=Fusing(library).fuse,
        sharing=Sharing(least_tokens=256, least_rows=2, exact=True),  # a block of attention.h
    )


def _functions(library: ctypes.CDLL, name: str, types: tuple[Any, ...], suffixes: Mapping[Any, str]) -> Table:
    table: Table = {}
    for key, suffix in suffixes.items():
        function = getattr(library, f"{name}_{suffix}")
        function.argtypes = types
        function.restype = c_int if name == "paged_attention" else None
        table[key] = function
    return table


class _Ops:
    """One method per operation of the contract; each finds its C function by its dtypes."""

    def __init__(self, **tables: Table) -> None:
        self._rms_norm = tables["rms_norm"]
        self._rope = tables["rope"]
        self._store_kv = tables["store_kv"]
        self._layer_norm = tables["layer_norm"]
        self._act = tables["act"]
        self._softcap = tables["softcap"]
        self._paged_attention = tables["paged_attention"]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        tokens, width = x.shape
        require(x.stride(1) == 1 and weight.shape == (width,), "rms_norm: x [T, H], weight [H]")
        same_dtype(x, weight)
        out = torch.empty((tokens, width), dtype=x.dtype)
        self._rms_norm[x.dtype](
            tokens, width, x.data_ptr(), x.stride(0), None, 0,
            weight.data_ptr(), eps, offset, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        tokens, width = x.shape
        require(
            x.shape == residual.shape and weight.shape == (width,) and x.stride(1) == residual.stride(1) == 1,
            "add_rms_norm: x and residual [T, H], weight [H]",
        )
        same_dtype(x, residual, weight)
        out = torch.empty((tokens, width), dtype=x.dtype)
        self._rms_norm[x.dtype](
            tokens, width, x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0),
            weight.data_ptr(), eps, offset, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out, residual

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return self._layer_normed(x, None, weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._layer_normed(x, residual, weight, bias, eps), residual

    def _layer_normed(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        tokens, width = x.shape
        added, shift = x if residual is None else residual, weight if bias is None else bias
        require(
            x.shape == added.shape
            and weight.shape == shift.shape == (width,)
            and x.stride(1) == added.stride(1) == 1,
            "layer_norm: x and residual [T, H], weight and bias [H]",
        )
        same_dtype(x, added, weight, shift)
        out = torch.empty((tokens, width), dtype=x.dtype)
        self._layer_norm[x.dtype](
            tokens, width, x.data_ptr(), x.stride(0),
            None if residual is None else residual.data_ptr(), added.stride(0),
            weight.data_ptr(), None if bias is None else bias.data_ptr(), eps, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        require(
            q.stride(2) == k.stride(2) == 1 and k.shape == (tokens, kv_heads, dim) and dim % 2 == 0,
            "rope: q [T, hq, d], k [T, hk, d]",
        )
        require(
            cos.shape == sin.shape == (tokens, dim // 2)
            and cos.dtype == sin.dtype == torch.float32
            and cos.is_contiguous()
            and sin.is_contiguous(),
            "rope: cos and sin [T, d/2] fp32",
        )
        same_dtype(q, k)
        self._rope[q.dtype](
            tokens, heads, kv_heads, dim, q.data_ptr(), q.stride(0), q.stride(1),
            k.data_ptr(), k.stride(0), k.stride(1),
            cos.data_ptr(), sin.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def store_kv(self, k: Tensor, v: Tensor, cache: PagedKV, slots: Tensor) -> None:
        tokens, kv_heads, dim = k.shape
        page_size = page_size_of(cache, kv_heads, dim)
        require(rows_only(k) and rows_only(v) and v.shape == k.shape, "store_kv: k and v [T, hk, d]")
        require(slots.dtype == torch.int64 and slots.shape == (tokens,), "store_kv: slots [T] int64")
        same_dtype(k, v)
        self._store_kv[dtypes_of(k, cache)](
            tokens, kv_heads, dim, page_size, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            *pointers_of(cache), slots.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    def act(self, x: Tensor, activation: Activation) -> Tensor:
        tokens, width = x.shape
        require(x.stride(1) == 1, "act: x [T, I]")
        out = torch.empty((tokens, width), dtype=x.dtype)
        self._act[x.dtype](
            tokens, width, x.data_ptr(), None, x.stride(0),
            out.data_ptr(), ACTIVATIONS[activation], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def act_mul(self, gate_up: Tensor, activation: GatedActivation) -> Tensor:
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        require(gate_up.stride(1) == 1 and gate_up.shape[1] % 2 == 0, "act_mul: gate_up [T, 2I]")
        out = torch.empty((tokens, width), dtype=gate_up.dtype)
        gate = gate_up.data_ptr()
        self._act[gate_up.dtype](
            tokens, width, gate, gate + width * gate_up.element_size(), gate_up.stride(0),
            out.data_ptr(), ACTIVATIONS[activation], torch.get_num_threads(),
        )  # fmt: skip
        return out

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        tokens, width = x.shape
        require(x.stride(1) == 1, "softcap: x [T, N]")
        out = torch.empty((tokens, width), dtype=x.dtype)
        self._softcap[x.dtype](
            tokens, width, x.data_ptr(), x.stride(0), cap, out.data_ptr(), torch.get_num_threads()
        )
        return out

    def paged_attention(
        self,
        q: Tensor,
        cache: PagedKV,
        page_table: Tensor,
        query_start: Tensor | None,
        context_lens: Tensor,
        how: Attention,
        shared: SharedPrefixes | None = None,
    ) -> Tensor:
        if query_start is None:
            if not context_lens.numpy().all():  # some are padding
                attend = partial(self.paged_attention, shared=shared)
                return attend_with_single_queries(attend, q, cache, page_table, context_lens, how)
            query_start = single_queries(q.shape[0])
        tokens, heads, dim = q.shape
        rows, kv_heads = page_table.shape[0], cache.keys.shape[1]
        page_size = page_size_of(cache, kv_heads, dim)
        require(rows_only(q) and heads % kv_heads == 0, "paged_attention: q [T, hq, d], hq a multiple of hk")
        require_rows("paged_attention", page_table, query_start, context_lens)
        for name, numbers in (("slopes", how.slopes), ("sinks", how.sinks)):
            require_per_head("paged_attention", name, numbers, heads)
        out = torch.empty((tokens, heads, dim), dtype=q.dtype)
        covered = int(query_start[-1])
        if covered < tokens:
            out[covered:].zero_()
        failed = self._paged_attention[dtypes_of(q, cache)](
            rows, kv_heads, heads // kv_heads, dim, page_size, q.data_ptr(), q.stride(0),
            *pointers_of(cache), page_table.data_ptr(), page_table.shape[1],
            query_start.data_ptr(), context_lens.data_ptr(), how.scale, how.window or 0, how.softcap or 0.0,
            *(None if each is None else each.data_ptr() for each in (how.slopes, how.sinks)),
            *groups_of(shared, rows), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("paged_attention: no memory for its list of work items")
        return out
