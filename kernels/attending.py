"""What attention is told: the pages it reads, how a layer attends, and which rows begin alike.

Owns these four types of the contract and what they mean, and the range of 8-bit caches; `kernels` has the operations
that take them, and hands the types on. Knows no set, no model and no request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# dtypes of 8 bits that a cache may have → the largest magnitude that each can store
LIMITS: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, slots=True, eq=False)
class PagedKV:
    """K and V of one layer, in pages; page_size is a multiple of 16. All tensors are contiguous, so that one vector
    load holds the same channel of K of many tokens; but where the set's `keys_by_token` says so, `keys` is a view of
    [pages, hk, page_size, d], and K lies as V does.

    Without scales K and V have the dtype of q, k and v; with scales they are int8 or float8_e4m3fn.
    """

    keys: Tensor  # [pages, hk, d, page_size]
    values: Tensor  # [pages, hk, page_size, d]
    key_scales: Tensor | None = None  # [pages, hk, page_size] bfloat16
    value_scales: Tensor | None = None  # [pages, hk, page_size] bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """How one layer attends. The score of a query and a key is `scale` · (q · k); then, where given,

    - `softcap` c: c · tanh(score / c) (Gemma 2),
    - `slopes` [hq] fp32, on the device of q: plus slope · (key position - query position) (ALiBi: Press et al. 2022),
    - `window` w: a query sees itself and the w - 1 tokens before it, and no others (Beltagy et al. 2020),
    - `sinks` [hq] fp32, on the device of q: each head's exp(sink) joins the sum that its weights are divided by, once
      for every query, whatever the window: a key without a value, whose score is `sink` (OpenAI gpt-oss 2025; models
      without one attend to their first tokens instead, Xiao et al. 2023). -infinity: the head has none.

    Raises `ValueError` for a window below 1 and a softcap that is not above 0.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be above 0, not {self.softcap}")


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefixes:
    """Which rows of a step begin with the same tokens, in the same pages: a hint, with which a set may read them once
    for all. All tensors are int32.

    G groups and N members are upper bounds: a group may be empty, and what `members` holds from `starts[G]` on is
    not read. A row that shares tokens is listed once. The page tables of two rows of a group agree on the pages of
    as many leading tokens as both share. A row may share more than its context holds.
    """

    tokens: Tensor  # [R] leading tokens that a row shares with its group; 0: it is in none
    members: Tensor  # [N] row numbers, one group after the other
    starts: Tensor  # [G + 1], G at least 1: group g is members[starts[g] : starts[g + 1]]


@dataclass(frozen=True, slots=True)
class Sharing:
    """What a set makes of a `SharedPrefixes`: from how many tokens and rows of a group on it reads them once for all,
    and whether that leaves every bit of every result as it is without."""

    least_tokens: int
    least_rows: int
    exact: bool
