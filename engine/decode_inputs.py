"""DecodeInputs: the tensors of a step in which every row computes its last token, where every step finds them.

Owns what rows are in numbers (last token, length, limit, how they draw), their page tables and the prefixes that they
share, and in which shape all of that is laid out: numbers of rows are rounded up to buckets and numbers of pages to
powers of two, so that few kinds of steps exist. Rows beyond the plan's own are padding: they see nothing and store
nothing, as rows do that have reached their limit. Tensors stay where they are, for graphs that read them. Knows
neither graphs nor draws (`decode_steps`).
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.sequence import Sequence
from engine.shared_prefixes import Group, shared_prefixes
from engine.staging import put
from engine.step_input import StepInput
from kernels import DecodingRows, Filters, SharedPrefixes, Sharing

LEAST_PAGES = 32  # in a page table: fewer kinds of steps
MOST_GROUPS = 8  # that attention is told of
STARTS = 16  # entries of `_shared` before those of rows: MOST_GROUPS + 1, rounded up to an aligned place

Shape: TypeAlias = tuple[int, int, bool]  # rows, pages, whether some rows share a prefix


class Extent(NamedTuple):
    """How far rows may go. `limits`: up to which token each may be computed, 0 for one without pages."""

    limits: list[int]
    groups: list[Group]  # of rows that share a prefix
    shape: Shape


class DecodeInputs:
    """`most_rows` and `most_pages`: of a plan, and of a row. `most_steps`: that are run together. `in_octaves`: few
    numbers of rows, two an octave; else all multiples of `row_multiple`. `sharing`: how the kernels read prefixes
    that rows share once for all of them; None: they are not told who does."""

    def __init__(
        self,
        device: torch.device,
        *,
        page_size: int,
        most_rows: int,
        most_pages: int,
        most_steps: int,
        row_multiple: int,
        in_octaves: bool,
        sharing: Sharing | None = None,
    ) -> None:
        self._device = device
        self._page_size = page_size
        self._row_multiple = row_multiple
        self._in_octaves = in_octaves
        self._sharing = sharing
        self._most_rows = most_rows
        self.num_rows = rows = self._bucket(most_rows)  # of the largest shape
        with torch.inference_mode():
            self._numbers = self._zeros(5, rows)  # token ids, lengths, limits, seeds, top_k
            self._floats = self._zeros(3, rows, dtype=torch.float64)  # temperatures, top_p, min_p
            self._tables = self._zeros(rows * _power_of_two(most_pages), dtype=torch.int32)
            self._shared = self._zeros(STARTS + 2 * rows, dtype=torch.int32)  # starts, tokens, members
            self._made = self._zeros(most_steps, rows)
            self._logprobs = self._zeros(most_steps, rows, dtype=torch.float32)
            self._counts = self._zeros(rows)
            self._positions, self._slots = self._zeros(rows), self._zeros(rows)
            self._context_lens = self._zeros(rows, dtype=torch.int32)

    # --- shapes ---------------------------------------------------------------------------------------------

    def short_shapes(self) -> list[Shape]:
        """Those of short contexts, for every number of rows, the largest first."""
        buckets = {self._bucket(count) for count in range(1, self._most_rows + 1)}
        return [(rows, LEAST_PAGES, False) for rows in sorted(buckets, reverse=True)]

    def extent(self, sequences: list[Sequence], num_steps: int) -> Extent:
        """For `num_steps` steps, or as many as a sequence may go."""
        limits = [one.num_computed + min(num_steps, one.num_wanted) if one.pages else 0 for one in sequences]
        groups: list[Group] = []
        if self._sharing is not None:
            tables = [one.pages for one in sequences]
            groups = shared_prefixes(tables, self._page_size, self._sharing, most_groups=MOST_GROUPS)
        pages = _power_of_two(-(-max(limits) // self._page_size))
        return Extent(limits, groups, (self._bucket(len(limits)), pages, bool(groups)))

    def _bucket(self, rows: int) -> int:
        """A row that is padding costs its share of products and nothing else."""
        if self._in_octaves:
            octave = 1 << (rows - 1).bit_length()
            rows = octave * 3 // 4 if octave > 16 and rows <= octave * 3 // 4 else octave
        return -(-rows // self._row_multiple) * self._row_multiple

    # --- from the host --------------------------------------------------------------------------------------

    def write(self, sequences: list[Sequence], extent: Extent, *, on: bool = False) -> None:
        """Put the rows' state where a step finds it. `on`: they are there and go on, with other limits and pages."""
        limits, groups, shape = extent
        numbers = np.zeros((5, shape[0]), dtype=np.int64)
        count = len(sequences)
        numbers[2, :count] = limits
        if on:
            put(numbers[2], self._numbers[2, : shape[0]])
        else:
            numbers[0, :count] = [one.token_ids[-1] for one in sequences]
            numbers[1, :count] = [one.num_computed + 1 for one in sequences]
            seeds = np.array([one.seed & 0xFFFFFFFFFFFFFFFF for one in sequences], dtype=np.uint64)
            numbers[3, :count] = seeds.view(np.int64)
            params = [one.request.sampling for one in sequences]
            numbers[4, :count] = [one.top_k for one in params]
            floats = np.zeros((3, shape[0]), dtype=np.float64)
            floats[:, :count] = np.transpose([(one.temperature, one.top_p, one.min_p) for one in params])
            put(numbers, self._numbers[:, : shape[0]])
            put(floats, self._floats[:, : shape[0]])
        self._put_groups(groups, shape)
        self._put_table(sequences, limits, shape)

    def _put_groups(self, groups: list[Group], shape: Shape) -> None:
        rows, _, shared = shape
        if not shared:
            return
        numbers = np.zeros(STARTS + 2 * rows, dtype=np.int32)
        starts, tokens, members = np.split(numbers, (STARTS, STARTS + rows))
        starts[1 : len(groups) + 1] = np.cumsum([len(group.rows) for group in groups])
        starts[len(groups) + 1 :] = starts[len(groups)]  # groups of no rows
        members[: starts[-1]] = [row for group in groups for row in group.rows]
        for group in groups:
            tokens[group.rows] = group.tokens
        put(numbers, self._shared[: len(numbers)])

    def _put_table(self, sequences: list[Sequence], limits: list[int], shape: Shape) -> None:
        used = -(-np.array(limits, dtype=np.int64) // self._page_size)
        pages = chain.from_iterable(one.pages[:count] for one, count in zip(sequences, used, strict=True))
        table = np.zeros(shape[:2], dtype=np.int32)
        held = np.arange(shape[1]) < used[:, None]
        table[: len(sequences)][held] = np.fromiter(pages, dtype=np.int32, count=int(used.sum()))
        put(table, self._table(shape))

    def clear(self) -> Tensor:
        """Nothing is seen and nothing is stored by any row. What `restore` takes: a launch may still run."""
        numbers = self._numbers.clone()
        self._numbers.zero_()  # limits of 0
        self._shared.zero_()  # it may name rows that a shape lacks, and is written anew for every launch
        return numbers

    def restore(self, numbers: Tensor) -> None:
        self._numbers.copy_(numbers)

    def rewind(self) -> None:
        """The next draw is the first."""
        self._counts.zero_()

    # --- to a step ------------------------------------------------------------------------------------------

    def rows(self, shape: Shape) -> DecodingRows:
        count = shape[0]
        token_ids, lengths, limits, *_ = self._numbers[:, :count]
        return DecodingRows(
            token_ids=token_ids,
            lengths=lengths,
            limits=limits,
            page_table=self._table(shape),
            page_size=self._page_size,
            counts=self._counts[:count],
            positions=self._positions[:count],
            slots=self._slots[:count],
            context_lens=self._context_lens[:count],
            made=self._made[:, :count],
            logprobs=self._logprobs[:, :count],
        )

    def step(self, shape: Shape) -> StepInput:
        count, rows = shape[0], self.rows(shape)
        starts, tokens, members = self._shared[: STARTS + 2 * count].split_with_sizes((STARTS, count, count))
        return StepInput(
            token_ids=rows.token_ids,
            positions=rows.positions,
            slots=rows.slots,
            page_table=rows.page_table,
            query_start=None,
            context_lens=rows.context_lens,
            logit_rows=None,
            scored_rows=rows.token_ids[:0],
            shared=SharedPrefixes(tokens, members, starts[: MOST_GROUPS + 1]) if shape[2] else None,
        )

    def drawn(self, num_steps: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """What steps have left: tokens `[steps, rows]` int64, logprobs `[steps, rows]` fp32 where some row asks."""
        return self._made[:num_steps, :num_rows], self._logprobs[:num_steps, :num_rows]

    def temperatures(self, shape: Shape) -> Tensor:
        """`[rows]` fp64."""
        return self._floats[0, : shape[0]]

    def seeds(self, shape: Shape) -> Tensor:
        """`[rows]` int64."""
        return self._numbers[3, : shape[0]]

    def filters(self, shape: Shape) -> Filters:
        _, top_p, min_p = self._floats[:, : shape[0]]
        return Filters(self._numbers[4, : shape[0]], top_p, min_p)

    def _table(self, shape: Shape) -> Tensor:
        return self._tables[: shape[0] * shape[1]].view(shape[:2])

    def _zeros(self, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self._device)


def _power_of_two(pages: int) -> int:
    return max(LEAST_PAGES, 1 << (pages - 1).bit_length())
