"""What C is told of tensors: where they lie, and that they are what the contract says, since C cannot check.

Owns the checks that operations share, and the names of dtypes and activations in C. Knows no operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from kernels import GatedActivation, PagedKV, SharedPrefixes

# as in ops.c
ACTIVATIONS: Mapping[GatedActivation, int] = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "relu": 3,
    "swiglu_oai": 4,
}
PAGED_SUFFIXES = {  # by the dtype of the activations and that of the cache
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.float32, torch.float32): "f32",
    (torch.bfloat16, torch.int8): "bf16_i8",
    (torch.float32, torch.int8): "f32_i8",
}


@lru_cache(maxsize=1024)
def single_queries(rows: int) -> Tensor:
    return torch.arange(rows + 1, dtype=torch.int32)


def rows_only(x: Tensor) -> bool:
    """True when only the token rows are strided."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def page_size_of(cache: PagedKV, kv_heads: int, dim: int) -> int:
    pages, page_size = cache.keys.shape[0], cache.keys.shape[3]
    require(
        cache.keys.shape == (pages, kv_heads, dim, page_size)
        and cache.values.shape == (pages, kv_heads, page_size, dim)
        and page_size % 16 == 0
        and cache.keys.is_contiguous()
        and cache.values.is_contiguous(),
        "keys [pages, hk, d, page_size], values [pages, hk, page_size, d], page_size a multiple of 16",
    )
    for scales in (cache.key_scales, cache.value_scales):
        require(
            (scales is not None) == (cache.keys.dtype == torch.int8)
            and (
                scales is None
                or (
                    scales.shape == (pages, kv_heads, page_size)
                    and scales.dtype == torch.bfloat16
                    and scales.is_contiguous()
                )
            ),
            "scales [pages, hk, page_size] bfloat16 for int8, none for other dtypes",
        )
    return page_size


def require_rows(operation: str, page_table: Tensor, query_start: Tensor, context_lens: Tensor) -> None:
    rows = page_table.shape[0]
    require(
        page_table.dtype == query_start.dtype == context_lens.dtype == torch.int32
        and query_start.shape == (rows + 1,)
        and context_lens.shape == (rows,)
        and page_table.is_contiguous(),
        f"{operation}: page_table [R, P], query_start [R+1], context_lens [R], all int32",
    )


def require_per_head(operation: str, name: str, numbers: Tensor | None, heads: int) -> None:
    require(
        numbers is None
        or (numbers.shape == (heads,) and numbers.dtype == torch.float32 and numbers.is_contiguous()),
        f"{operation}: {name} [hq] fp32",
    )


def dtypes_of(x: Tensor, cache: PagedKV) -> tuple[torch.dtype, torch.dtype]:
    """The key of `PAGED_SUFFIXES`."""
    pair = (x.dtype, cache.keys.dtype)
    require(pair in PAGED_SUFFIXES and cache.values.dtype == pair[1], "the cache has the dtype of q or int8")
    return pair


def pointers_of(cache: PagedKV) -> tuple[int | None, ...]:
    """K, V and their scales, as both paged operations take them."""
    parts = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return tuple(None if part is None else part.data_ptr() for part in parts)


def groups_of(shared: SharedPrefixes | None, rows: int) -> tuple[int | None, int | None, int | None, int]:
    """A hint as `paged_attention` takes it, of `rows` rows: tokens, members, starts, number of groups."""
    if shared is None:
        return None, None, None, 0
    parts = (shared.tokens, shared.members, shared.starts)
    require(
        all(part.dtype == torch.int32 and part.ndim == 1 and part.is_contiguous() for part in parts)
        and shared.tokens.shape == (rows,)
        and len(shared.starts) > 1,
        "shared: tokens [R], members [N], starts [G+1], all int32",
    )
    return *(part.data_ptr() for part in parts), len(shared.starts) - 1  # type: ignore[return-value]


def same_dtype(*tensors: Tensor) -> None:
    dtype = tensors[0].dtype
    require(all(tensor.dtype == dtype for tensor in tensors), "all tensors must share one dtype")


def require(held: bool, contract: str) -> None:
    if not held:
        raise ValueError(f"contract broken, {contract}")
