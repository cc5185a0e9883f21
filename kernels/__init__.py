"""The six operations of a decoder step, as one frozen value with one written contract.

Owns the contract and the choice of a set. Knows nothing of models, requests or pages' owners. A set is a
`Kernels` value handed down by whoever built it: no globals and no environment variables choose one, so two
models with different sets can live in one process.

Contract, for every set. T tokens, R rows (sequences), hq query heads, hk key/value heads, d head dimension,
P pages per row in the table. All tensors on one device; x, weights, q, k and v share one dtype.

- Sums, exponentials and divisions are in fp32; each result is rounded to the dtype once.
- Every token's result depends on that token's inputs alone, never on T, R or the other rows.
- The last dimension is contiguous; token rows may be strided (views of a wider matrix).
- T = 0 and R = 0 are allowed and do nothing.

Cache layout: `PagedKV`. Slot s is token `s % page_size` of page `s // page_size`. Slots that no row's context
covers may hold anything, NaN included. Nor does a query meet what its own row stores behind it: NaN there
changes no bit of the query's result.

A cache of 8 bits has one scale per token and kv head, for K and for V. The scale is the largest |x| over d
divided by 127 (int8) or 448 (fp8), rounded up to bfloat16 so that nothing clips; what is stored is x / scale,
rounded to nearest even, and means stored · scale in fp32. A vector of zeros has scale 0. A vector with NaN or
infinity has scale NaN, so that the failure is carried. Only the token's own vector decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

KernelSet = Literal["auto", "reference", "cpu"]


@dataclass(frozen=True, slots=True, eq=False)
class PagedKV:
    """K and V of one layer, in pages; page_size is a multiple of 16. All tensors are contiguous.

    K is transposed inside the page, so that one vector load holds the same channel of many tokens. Without
    scales K and V have the dtype of q, k and v; with scales they are int8 or float8_e4m3fn.
    """

    keys: Tensor  # [pages, hk, d, page_size]
    values: Tensor  # [pages, hk, page_size, d]
    key_scales: Tensor | None = None  # [pages, hk, page_size] bfloat16
    value_scales: Tensor | None = None  # [pages, hk, page_size] bfloat16


@dataclass(frozen=True, slots=True)
class Kernels:
    """One kernel set.

    - `rms_norm(x [T, H], weight [H], eps) -> [T, H]`: x / sqrt(mean(x²) + eps) · weight
      (Zhang and Sennrich 2019).
    - `add_rms_norm(x [T, H], residual [T, H], weight [H], eps) -> (normed [T, H], new residual [T, H])`:
      the new residual is x + residual rounded to the dtype, and what is normed. May overwrite `residual`.
    - `rope(q [T, hq, d], k [T, hk, d], cos [T, d/2] fp32, sin [T, d/2] fp32)`: rotates in place; channel i
      is paired with channel i + d/2 (Su et al. 2021, in the half-split order of Hugging Face checkpoints).
      Heads may be strided as well: d is then the number of first channels that are rotated, the others stay.
    - `store_kv(k [T, hk, d], v [T, hk, d], cache, slots [T] int64)`: slot -1 is skipped.
    - `silu_mul(gate_up [T, 2I]) -> [T, I]`: silu(first half) · second half (Shazeer 2020).
    - `paged_attention(q [T, hq, d], cache, page_table [R, P] int32, query_start [R+1] int32,
      context_lens [R] int32, scale) -> [T, hq, d]`: causal attention of each row's queries
      `query_start[r]:query_start[r+1]` over its first `context_lens[r]` tokens, of which those queries are
      the last ones and are already stored. Query head h reads kv head `h // (hq / hk)`. Rows of one token
      and of many mix freely. Tokens from `query_start[R]` on are padding: their result is zero.

    `quantised` names the dtypes of 8-bit caches that the set serves.
    """

    name: str
    quantised: tuple[torch.dtype, ...]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    store_kv: Callable[[Tensor, Tensor, PagedKV, Tensor], None]
    silu_mul: Callable[[Tensor], Tensor]
    paged_attention: Callable[[Tensor, PagedKV, Tensor, Tensor, Tensor, float], Tensor]


def kernels_for(device: str, name: KernelSet = "auto", *, dtype: torch.dtype = torch.bfloat16) -> Kernels:
    """The set for a device. `auto` takes the fastest that runs there.

    Raises `ValueError` for a name that is unknown or cannot run on the device. Asking for `cpu` where no
    C compiler works gives `reference`, with a warning in the log, because the answers are the same.
    """
    from kernels import reference

    if name not in ("auto", "reference", "cpu"):
        raise ValueError(f"kernels must be auto, reference or cpu, not {name!r}")
    on_cpu = torch.device(device).type == "cpu"
    if name == "cpu" and not on_cpu:
        raise ValueError(f"the cpu kernels cannot run on {device}")
    if name == "reference" or not on_cpu or dtype not in (torch.bfloat16, torch.float32):
        return reference.KERNELS

    from kernels import cpu

    try:
        return cpu.kernels()
    except cpu.BuildError as error:
        logger.warning("cpu kernels unavailable, using the slow reference set: %s", error)
        return reference.KERNELS
