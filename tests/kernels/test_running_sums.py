"""Running sums: those of a GPU, in pieces, on a CPU, where any number of rows gives the same bits anyway."""

from __future__ import annotations

import pytest
import torch

from kernels.running_sums import LEAST_WIDTH, ROWS, in_pieces, running_sums


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1, 3 * ROWS])
@pytest.mark.parametrize("width", [1, 300, LEAST_WIDTH, LEAST_WIDTH + 7])
def test_pieces_give_the_sums_of_whole_rows(rows: int, width: int) -> None:
    x = torch.rand(rows, width, dtype=torch.float64)
    assert torch.equal(in_pieces(x), x.cumsum(dim=1))
    assert torch.equal(running_sums(x), x.cumsum(dim=1))


def test_no_rows_are_no_work() -> None:
    assert in_pieces(torch.empty(0, 5)).shape == (0, 5)


def test_pieces_are_wide_enough_for_all_threads() -> None:
    """torch takes 2^((9 + log2 width - log2 rows) / 2) threads a row, and 2^9 at most."""
    assert LEAST_WIDTH >= 512 * ROWS
