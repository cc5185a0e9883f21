"""What the contract says of rows that decode without the host: the numbers of each that a step takes and leaves.

Owns this one type and what it means; `kernels` has the operation that takes it (`advance`), and hands the type on.
Knows no set, no model, and not who writes what a launch begins with.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DecodingRows:
    """S rows, each of which computes its last token in a step. A row goes on where 0 < length ≤ limit; another one,
    padding or at its end, sees nothing and stores nothing. All tensors on one device, the last dimension contiguous.

    Whoever begins writes the first four; `advance` keeps token ids, lengths and counts up, and makes the other three,
    which are a step's input, of them. `made` and `logprobs` are what steps leave.
    """

    token_ids: Tensor  # [S] int64, the last one of each row
    lengths: Tensor  # [S] int64, tokens there are, the last one included
    limits: Tensor  # [S] int64, the last length with which a row goes on
    page_table: Tensor  # [S, P] int32, read where a row goes on
    page_size: int
    counts: Tensor  # [S] int64, draws since the beginning, below N
    positions: Tensor  # [S] int64, of the last token; 0, or one that it has, of a row that does not go on
    slots: Tensor  # [S] int64, of the last token; -1 where a row does not go on
    context_lens: Tensor  # [S] int32, as lengths; 0 where a row does not go on
    made: Tensor  # [N, S] int64, what was drawn, one line per draw
    logprobs: Tensor  # [N, S] fp32
