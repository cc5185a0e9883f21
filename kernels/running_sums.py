"""Running sums along rows, whose bits depend on the row's own values alone.

Owns the one operation for which torch's `cumsum` will not do on a GPU: there the number of threads that work on a
row, and with it the order of sums, depends on how many rows there are and how wide they are, up to a limit. Here
`cumsum` always gets as many rows and columns as reach that limit; zeros behind a row change none of its sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 32
LEAST_WIDTH = 2**14  # torch: 512 threads, its limit, once the width is 512 times the rows


def running_sums(x: Tensor) -> Tensor:
    """x `[n, width]`, at least 0 → of each row the sums up to and including each value `[n, width]`."""
    return x.cumsum(dim=1) if x.device.type == "cpu" else in_pieces(x)


def in_pieces(x: Tensor) -> Tensor:
    """As `running_sums`, a few rows at a time, filled up with zeros."""
    rows, width = x.shape
    found = torch.empty_like(x)
    for start in range(0, rows, ROWS):
        piece = x[start : start + ROWS]
        filled = pad(piece, (0, max(0, LEAST_WIDTH - width), 0, ROWS - piece.shape[0]))
        found[start : start + ROWS] = filled.cumsum(dim=1)[: piece.shape[0], :width]
    return found
