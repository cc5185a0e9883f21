"""DecodeSteps: steps in which every row computes its last token, run without the host.

Owns the tensors of such a step, which stay where they are, so that on a GPU a step is captured once for a number of
rows and of pages and then replayed (CUDA graphs); and the advance from one step to the next, which happens on the
device: a token that was drawn is the next one's input. Between two steps nothing is asked of the host, and what was
drawn comes back after the last. Knows no plans' reasons (`multi_step`) and no kernels' insides.

Numbers of rows are rounded up to buckets and numbers of pages to powers of two. Rows beyond the plan's own are
padding: they see nothing and store nothing. A row that has reached its limit stays there and stores nothing more.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.cache import KVCache
from engine.model import Decoder
from engine.plan import Row
from engine.step_input import StepInput

if TYPE_CHECKING:
    from engine.fallback import Fallback

LEAST_PAGES = 32  # in a page table: fewer kinds of graphs


class Graphs(NamedTuple):
    """Of one number of rows and of pages."""

    forward: torch.cuda.CUDAGraph  # from the inputs to the logits
    draw: torch.cuda.CUDAGraph  # from the logits to the next step's inputs
    logits: Tensor  # [rows, vocab]


class DecodeSteps:
    """`most_rows` and `most_pages`: of a plan, and of a row. `most_steps`: that are run together."""

    def __init__(
        self,
        decoder: Decoder | Fallback,
        cache: KVCache,
        *,
        page_size: int,
        most_rows: int,
        most_pages: int,
        most_steps: int,
        row_multiple: int,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._page_size = page_size
        self._row_multiple = row_multiple
        self._most_rows = most_rows
        self._device = torch.device(decoder.device)
        self._captures = self._device.type == "cuda" and decoder.capturable
        self._graphs: dict[tuple[int, int], Graphs] = {}
        self._memory = torch.cuda.graph_pool_handle() if self._captures else None
        rows, pages = self._bucket(most_rows), _power_of_two(most_pages)
        with torch.inference_mode():
            self._numbers = self._zeros(4, rows)  # token ids, positions, limits, seeds
            self._temperatures = self._zeros(rows, dtype=torch.float64)
            self._tables = self._zeros(rows * pages, dtype=torch.int32)
            self._made = self._zeros(most_steps, rows)
            self._count = self._zeros(1)  # steps since the inputs were written

    @property
    def captures(self) -> bool:
        """Whether steps are replayed from graphs."""
        return self._captures

    def draw(self, rows: tuple[Row, ...], num_steps: int) -> list[list[int]]:
        """Tokens of each row, one per step, -1 where logits were not finite. Each row computes its sequence's last
        token, and its pages cover as many more as it may still generate, up to `num_steps`."""
        shape = self._write(rows, num_steps)
        for _ in range(num_steps):
            self._draw(shape, self._forward(shape))
        made = self._made[:num_steps, : len(rows)].cpu()
        drawn: list[list[int]] = made.t().tolist()
        return drawn

    def logits(self, rows: tuple[Row, ...]) -> Tensor:
        """`[len(rows), vocab]` behind each row's last token, which is stored; valid until the next call."""
        return self._forward(self._write(rows, 1))[: len(rows)]

    # --- inputs ---------------------------------------------------------------------------------------------

    def _write(self, rows: tuple[Row, ...], num_steps: int) -> tuple[int, int]:
        """Put the rows' state where a step finds it. Returns the numbers of rows and pages of that step."""
        sequences = [row.sequence for row in rows]
        positions = [one.num_computed for one in sequences]
        limits = [one.num_computed + min(num_steps, one.num_wanted) for one in sequences]
        used = np.array([-(-limit // self._page_size) for limit in limits], dtype=np.int64)
        shape = self._bucket(len(rows)), _power_of_two(int(used.max()))
        self._prepare(shape)

        numbers = np.zeros((4, shape[0]), dtype=np.int64)
        numbers[0, : len(rows)] = [one.token_ids[-1] for one in sequences]
        numbers[1, : len(rows)] = positions
        numbers[2, : len(rows)] = limits
        seeds = np.array([one.seed & 0xFFFFFFFFFFFFFFFF for one in sequences], dtype=np.uint64)
        numbers[3, : len(rows)] = seeds.view(np.int64)
        temperatures = np.zeros(shape[0], dtype=np.float64)
        temperatures[: len(rows)] = [one.request.sampling.temperature for one in sequences]
        tables = np.zeros(shape, dtype=np.int32)
        pages = chain.from_iterable(one.pages[:count] for one, count in zip(sequences, used, strict=True))
        held = np.arange(shape[1]) < used[:, None]
        tables[: len(rows)][held] = np.fromiter(pages, dtype=np.int32, count=int(used.sum()))

        self._numbers[:, : shape[0]].copy_(torch.from_numpy(numbers))
        self._temperatures[: shape[0]].copy_(torch.from_numpy(temperatures))
        self._table(shape).copy_(torch.from_numpy(tables))
        self._count.zero_()
        return shape

    def _step(self, shape: tuple[int, int]) -> StepInput:
        rows = shape[0]
        token_ids, positions, limits, _ = self._numbers[:, :rows]
        at = torch.minimum(positions, limits - 1).clamp_(min=0)
        table = self._table(shape)
        page = table.gather(1, (at // self._page_size)[:, None])[:, 0]
        slots = torch.where(positions < limits, page * self._page_size + at % self._page_size, -1)
        return StepInput(
            token_ids=token_ids,
            positions=at,
            slots=slots,
            page_table=table,
            query_start=None,
            context_lens=torch.minimum(positions + 1, limits).int(),
            logit_rows=torch.arange(rows, device=self._device),
            scored_rows=token_ids[:0],
        )

    # --- one step -------------------------------------------------------------------------------------------

    def _compute(self, shape: tuple[int, int]) -> Tensor:
        return self._decoder.forward(self._step(shape), self._cache)

    def _advance(self, shape: tuple[int, int], logits: Tensor) -> None:
        """Draw, keep what was drawn, and make it the next step's input."""
        token_ids, positions, _, seeds = self._numbers[:, : shape[0]]
        positions += 1  # tokens there are, which is what the noise of a draw is made of
        drawn = self._decoder.kernels.sample(logits, self._temperatures[: shape[0]], seeds, positions)
        self._made[:, : shape[0]].index_copy_(0, self._count, drawn[None])
        torch.clamp(drawn, min=0, out=token_ids)
        self._count += 1

    def _forward(self, shape: tuple[int, int]) -> Tensor:
        if not self._captures:
            return self._compute(shape)
        graphs = self._graphs[shape]
        graphs.forward.replay()
        return graphs.logits

    def _draw(self, shape: tuple[int, int], logits: Tensor) -> None:
        if self._captures:
            self._graphs[shape].draw.replay()
        else:
            self._advance(shape, logits)

    def _prepare(self, shape: tuple[int, int]) -> None:
        """Capture a step of this shape, unless that was done. What the inputs held is lost."""
        if not self._captures or shape in self._graphs:
            return
        self._numbers.zero_()  # limits of 0: nothing is seen and nothing is stored
        self._count.zero_()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._advance(shape, self._compute(shape))  # compiles and allocates what a capture must not
            self._numbers.zero_()
            self._count.zero_()
            forward, draw = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            forward.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            logits = self._compute(shape)
            forward.capture_end()
            draw.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            self._advance(shape, logits)
            draw.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graphs[shape] = Graphs(forward, draw, logits)

    # --- shapes ---------------------------------------------------------------------------------------------

    def _bucket(self, rows: int) -> int:
        """On a GPU few kinds, each at most an eighth too large from 16 rows on."""
        if self._captures and rows > 16:
            step = max(8, _power_of_two(rows) // 16, 1)
            rows = -(-rows // step) * step
        elif self._captures:
            rows = 1 << (rows - 1).bit_length()
        return -(-rows // self._row_multiple) * self._row_multiple

    def _table(self, shape: tuple[int, int]) -> Tensor:
        return self._tables[: shape[0] * shape[1]].view(shape)

    def _zeros(self, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self._device)


def _power_of_two(pages: int) -> int:
    return max(LEAST_PAGES, 1 << (pages - 1).bit_length())
