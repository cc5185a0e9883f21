"""The contract of what stands around the blocks of a step: look-ups in tables, and the way from step to step."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from kernels import FAILED, DecodingRows, Kernels, Rotations

PAGE, PAGES, DRAWS = 16, 4, 3


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("pairs", [0, 1, 2])
@pytest.mark.parametrize("width", [64, 1100])
def test_lines_of_tables(kernels: Kernels, dtype: torch.dtype, pairs: int, width: int) -> None:
    embedding = numbers(50, width, dtype=dtype)
    embedding[7, 3] = float("nan")  # bits are copied, whatever they mean
    tables: Rotations = tuple((numbers(30 + i, 24), numbers(40 + i, 24)) for i in range(pairs))
    token_ids, positions = torch.tensor([7, 0, 49, 7, 3]), torch.tensor([29, 4, 0, 4, 17])
    x, rotations = kernels.look_up(token_ids, positions, embedding, tables)
    assert x.is_contiguous()
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    assert torch.equal(x.view(integers), embedding[token_ids].view(integers))
    assert len(rotations) == pairs
    for pair, found in zip(tables, rotations, strict=True):
        for table, lines in zip(pair, found, strict=True):
            assert torch.equal(lines, table[positions])
            assert lines.is_contiguous()


def test_no_tokens(kernels: Kernels) -> None:
    none, table = torch.empty(0, dtype=torch.int64), numbers(9, 4)
    x, ((cos, sin),) = kernels.look_up(none, none, numbers(5, 8), ((table, table),))
    assert (x.shape, cos.shape, sin.shape) == ((0, 8), (0, 4), (0, 4))


def rows_of(lengths: list[int], limits: list[int]) -> DecodingRows:
    """Every number is a view of a wider line; what is to be made is wrong before. No page is that of another row, and
    where a row does not go on its entries are none at all."""
    count = len(lengths)

    def line(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        wide = torch.full((count + 3,), -5, dtype=dtype)
        wide[:count] = torch.tensor(values, dtype=dtype)
        return wide[:count]

    table = torch.full((count, PAGES), -(2**31), dtype=torch.int32)
    for row, limit in enumerate(limits):
        for page in range(-(-limit // PAGE)):
            table[row, page] = 100 + PAGES * row + page
    return DecodingRows(
        token_ids=line([70 + row for row in range(count)]),
        lengths=line(lengths),
        limits=line(limits),
        page_table=table,
        page_size=PAGE,
        counts=line([9] * count),
        positions=line([-9] * count),
        slots=line([-9] * count),
        context_lens=line([-9] * count, torch.int32),
        made=torch.full((DRAWS, count + 2), -7)[:, :count],
        logprobs=torch.full((DRAWS, count + 2), 7.0)[:, :count],
    )


def expected(row: int, length: int, limit: int) -> tuple[int, int, int]:
    """Position, slot, context."""
    if 0 < length <= limit:
        page, within = divmod(length - 1, PAGE)
        return length - 1, (100 + PAGES * row + page) * PAGE + within, length
    return max(min(length, limit) - 1, 0), -1, 0


def check(rows: DecodingRows, lengths: list[int], limits: list[int]) -> None:
    assert rows.lengths.tolist() == lengths
    each = zip(rows.positions.tolist(), rows.slots.tolist(), rows.context_lens.tolist(), strict=True)
    assert list(each) == [expected(row, *of) for row, of in enumerate(zip(lengths, limits, strict=True))]
    for field in fields(rows):
        line = getattr(rows, field.name)
        if isinstance(line, Tensor) and line.dim() == 1:
            assert (line.as_strided((3,), (1,), len(lengths)) == -5).all(), field.name


LENGTHS = [1, 16, 17, 40, 41, 0, 0, 3, 5, 64]
LIMITS = [9, 18, 18, 42, 42, 0, 6, 0, 4, 64]  # also of rows at their end, without pages, and that are padding


def test_a_launch_begins(kernels: Kernels) -> None:
    rows = rows_of(LENGTHS, LIMITS)
    token_ids = rows.token_ids.tolist()
    kernels.advance(rows, None)
    check(rows, LENGTHS, LIMITS)
    assert rows.token_ids.tolist() == token_ids
    assert rows.counts.tolist() == [0] * len(LENGTHS)
    assert (rows.made == -7).all()
    assert (rows.logprobs == 7.0).all()


@pytest.mark.parametrize("scored", [False, True])
def test_what_is_drawn_is_kept_and_becomes_the_next_input(
    kernels: Kernels, dtype: torch.dtype, scored: bool
) -> None:
    rows, made, told = rows_of(LENGTHS, LIMITS), [], []
    kernels.advance(rows, None)
    logits = numbers(len(LENGTHS), 90, dtype=dtype)[:, 10:]
    for step in range(DRAWS):
        drawn = torch.tensor([(11 * row + 29 * step) % 80 for row in range(len(LENGTHS))])
        drawn[step] = FAILED
        if scored:
            of = kernels.normalisers(logits)
            kernels.advance(rows, drawn, logits, of)
            found = logits[range(len(LENGTHS)), drawn.clamp(min=0)].float()
            told.append((found - of.largest) - of.log_sums)
        else:
            kernels.advance(rows, drawn)
        made.append(drawn)
        check(rows, [length + step + 1 for length in LENGTHS], LIMITS)
        assert rows.counts.tolist() == [step + 1] * len(LENGTHS)
        assert rows.token_ids.tolist() == drawn.clamp(min=0).tolist()
        assert torch.equal(rows.made[: step + 1], torch.stack(made))
        assert (rows.made[step + 1 :] == -7).all()
        assert (rows.logprobs[len(told) :] == 7.0).all()
    if scored:
        assert torch.equal(rows.logprobs, torch.stack(told))
    for kept, before in ((rows.made, -7), (rows.logprobs, 7.0)):
        assert (kept.as_strided((DRAWS, 2), (kept.stride(0), 1), len(LENGTHS)) == before).all()


def test_more_rows_than_a_program_has(kernels: Kernels) -> None:
    lengths = [1 + row % 60 for row in range(300)]
    limits = [20 + row % 41 for row in range(300)]
    rows = rows_of(lengths, limits)
    kernels.advance(rows, None)
    drawn = torch.arange(300) % 83
    kernels.advance(rows, drawn)
    check(rows, [length + 1 for length in lengths], limits)
    assert torch.equal(rows.made[0], drawn)


def test_no_rows(kernels: Kernels) -> None:
    rows = rows_of([], [])
    kernels.advance(rows, None)
    kernels.advance(rows, torch.empty(0, dtype=torch.int64))
