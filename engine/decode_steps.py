"""DecodeSteps: steps in which every row computes its last token, run without the host.

Owns the tensors of such a step, which stay where they are, so that on a GPU a step is captured once for a number of
rows and of pages and then replayed (CUDA graphs); and the advance from one step to the next, which happens on the
device: a token that was drawn is the next one's input. Between two steps nothing is asked of the host, and what was
drawn comes back after the last. Knows no plans' reasons (`multi_step`) and no kernels' insides.

Numbers of rows are rounded up to buckets and numbers of pages to powers of two. Rows beyond the plan's own are
padding: they see nothing and store nothing, as rows do that have reached their limit.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, product, starmap
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.cache import KVCache
from engine.model import Decoder
from engine.penalties import KeptPenalties
from engine.plan import Row
from engine.sequence import Sequence
from engine.shared_prefixes import Group, shared_prefixes
from engine.shortage import Pauses, is_shortage
from engine.staging import put
from engine.step_input import StepInput
from kernels import DecodingRows, Filters, SharedPrefixes, Sharing

if TYPE_CHECKING:
    from engine.fallback import Fallback

logger = logging.getLogger(__name__)

LEAST_PAGES = 32  # in a page table: fewer kinds of graphs
MOST_GROUPS = 8  # that attention is told of
STARTS = 16  # entries of `_shared` before those of rows: MOST_GROUPS + 1, rounded up to an aligned place

Shape: TypeAlias = tuple[int, int, bool]  # rows, pages, whether some rows share a prefix


class Draw(NamedTuple):
    """What a draw takes because some row asks for it."""

    filtered: bool = False  # top-k, top-p or min-p
    scored: bool = False  # the logprob of what was drawn
    penalised: bool = False  # by what the row has said before

    @classmethod
    def of(cls, rows: tuple[Row, ...]) -> Draw:
        params = [row.sequence.request.sampling for row in rows]
        return cls(
            filtered=any(one.narrows for one in params),
            scored=any(one.logprobs is not None for one in params),
            penalised=any(row.sequence.rules is not None for row in rows),  # of rows that decode freely
        )


DRAWS = tuple(starmap(Draw, product((False, True), repeat=3)))  # every kind


class Graphs(NamedTuple):
    """Of one `Shape`. The logits between them are memory that the graphs of all shapes share: they are gone when
    another shape's are replayed."""

    forward: torch.cuda.CUDAGraph  # from the inputs to the logits
    draws: dict[Draw, torch.cuda.CUDAGraph]  # from the logits to the next step's inputs
    keep: torch.cuda.CUDAGraph  # the logits to where others may read them


class Drawn:
    """What a launch draws, on its way to the host: made `[steps, rows]` int64, and logprobs `[steps, rows]` fp32
    where some row asks for them."""

    def __init__(self, made: Tensor, logprobs: Tensor | None) -> None:
        on_gpu = made.device.type == "cuda"
        self._made, self._logprobs = (
            None
            if one is None
            else torch.empty(one.shape, dtype=one.dtype, pin_memory=on_gpu).copy_(one, non_blocking=True)
            for one in (made, logprobs)
        )
        self._there = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self._there is not None:
            self._there.record()

    def tokens(self) -> list[list[int]]:
        """Of each row, one per step, -1 where logits were not finite. Waits for them."""
        return self._by_row(self._made)

    def logprobs(self) -> list[list[float]]:
        """Of each row, one per step; nothing where no row asks. Waits for them."""
        return self._by_row(self._logprobs)

    def _by_row(self, numbers: Tensor | None) -> list[list[Any]]:
        if self._there is not None:
            self._there.synchronize()
        return [] if numbers is None else numbers.t().tolist()


class DecodeSteps:
    """`most_rows` and `most_pages`: of a plan, and of a row. `most_steps`: that are run together. `sharing`: how the
    kernels read prefixes that rows share once for all of them; None: they are not told who does."""

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
        sharing: Sharing | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._page_size = page_size
        self._row_multiple = row_multiple
        self._most_rows = most_rows
        self._device = torch.device(decoder.device)
        self._captures = self._device.type == "cuda" and decoder.capturable
        self._sharing = sharing
        self._graphs: dict[Shape, Graphs] = {}
        self._pauses = Pauses[Shape]()  # counted in launches, of captures that found no memory
        self._memory = torch.cuda.graph_pool_handle() if self._captures else None
        # one for all captures: products keep some memory for every stream that they have met
        self._aside = torch.cuda.Stream(self._device) if self._captures else None  # type: ignore[no-untyped-call]
        rows, pages = self._bucket(most_rows), _power_of_two(most_pages)
        with torch.inference_mode():
            self._numbers = self._zeros(5, rows)  # token ids, lengths, limits, seeds, top_k
            self._heats = self._zeros(3, rows, dtype=torch.float64)  # temperatures, top_p, min_p
            self._tables = self._zeros(rows * pages, dtype=torch.int32)
            self._shared = self._zeros(STARTS + 2 * rows, dtype=torch.int32)  # starts, tokens, members
            self._made = self._zeros(most_steps, rows)
            self._logprobs = self._zeros(most_steps, rows, dtype=torch.float32)
            self._penalties = KeptPenalties(
                rows,
                most_new=2 * most_steps,  # of a launch and one behind it
                most_distinct=min(most_pages * page_size, decoder.config.vocab_size),
                device=self._device,
            )
            self._counts = self._zeros(rows)  # of draws since the inputs were written
            self._positions, self._slots = self._zeros(rows), self._zeros(rows)
            self._context_lens = self._zeros(rows, dtype=torch.int32)
            self._logits = self._zeros(
                rows if self._captures else 0, decoder.config.vocab_size, dtype=decoder.dtype
            )

    def capture(self) -> None:
        """Make the graphs of short contexts, for every number of rows, the largest first: they share its memory.
        Those of longer ones are made when they are met. Nothing where no graph is used."""
        if self._captures:
            with torch.inference_mode():
                for rows in sorted({self._bucket(n) for n in range(1, self._most_rows + 1)}, reverse=True):
                    self._prepare((rows, LEAST_PAGES, False))

    @property
    def captures(self) -> bool:
        """Whether steps are replayed from graphs."""
        return self._captures

    def launch(self, rows: tuple[Row, ...], num_steps: int, *, behind: int = 0) -> Drawn:
        """Each row computes its sequence's last token, draws, and goes on for `num_steps` steps or as long as its
        sequence may; its pages cover that. `behind`: steps of a launch of the same rows whose draws nobody has read:
        rows go on where it stops, but for those that have no pages any more."""
        shape = self._write(rows, behind + num_steps, on=behind > 0)
        draw = Draw.of(rows)
        if draw.penalised and not behind:
            self._penalties.write([row.sequence for row in rows], shape[0])
        graphs = self._graphs.get(shape)
        for _ in range(num_steps):
            if graphs is None:
                self._advance(shape, self._compute(shape), draw)
            else:
                graphs.forward.replay()
                graphs.draws[draw].replay()
        made = self._made[:num_steps, : len(rows)]
        return Drawn(made, self._logprobs[:num_steps, : len(rows)] if draw.scored else None)

    def logits(self, rows: tuple[Row, ...]) -> Tensor:
        """`[len(rows), vocab]` behind each row's last token, which is stored; valid until the next call."""
        shape = self._write(rows, 1)
        graphs = self._graphs.get(shape)
        if graphs is None:
            return self._compute(shape)[: len(rows)]
        graphs.forward.replay()
        graphs.keep.replay()
        return self._logits[: len(rows)]

    # --- inputs ---------------------------------------------------------------------------------------------

    def _write(self, rows: tuple[Row, ...], num_steps: int, *, on: bool = False) -> Shape:
        """Put the rows' state where a step finds it. `on`: they are there and go on, with other limits and pages."""
        sequences = [row.sequence for row in rows]
        limits, groups, shape = self._limits(sequences, num_steps)
        self._pauses.pass_one()
        self._prepare(shape)
        numbers = np.zeros((5, shape[0]), dtype=np.int64)
        numbers[2, : len(rows)] = limits
        if on:
            put(numbers[2], self._numbers[2, : shape[0]])
        else:
            numbers[0, : len(rows)] = [one.token_ids[-1] for one in sequences]
            numbers[1, : len(rows)] = [one.num_computed + 1 for one in sequences]
            seeds = np.array([one.seed & 0xFFFFFFFFFFFFFFFF for one in sequences], dtype=np.uint64)
            numbers[3, : len(rows)] = seeds.view(np.int64)
            params = [one.request.sampling for one in sequences]
            numbers[4, : len(rows)] = [one.top_k for one in params]
            heats = np.zeros((3, shape[0]), dtype=np.float64)
            heats[:, : len(rows)] = np.transpose([(one.temperature, one.top_p, one.min_p) for one in params])
            put(numbers, self._numbers[:, : shape[0]])
            put(heats, self._heats[:, : shape[0]])
        self._put_groups(groups, shape)
        self._put_table(sequences, limits, shape)
        self._decoder.kernels.advance(self._rows(shape), None)
        return shape

    def _limits(self, sequences: list[Sequence], num_steps: int) -> tuple[list[int], list[Group], Shape]:
        """Up to which token each may be computed, 0 for one without pages; and who shares a prefix."""
        limits = [one.num_computed + min(num_steps, one.num_wanted) if one.pages else 0 for one in sequences]
        groups: list[Group] = []
        if self._sharing is not None:
            tables = [one.pages for one in sequences]
            groups = shared_prefixes(tables, self._page_size, self._sharing, most_groups=MOST_GROUPS)
        pages = _power_of_two(-(-max(limits) // self._page_size))
        return limits, groups, (self._bucket(len(limits)), pages, bool(groups))

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

    def _rows(self, shape: Shape) -> DecodingRows:
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

    def _step(self, shape: Shape) -> StepInput:
        count, rows = shape[0], self._rows(shape)
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

    # --- one step -------------------------------------------------------------------------------------------

    def _compute(self, shape: Shape) -> Tensor:
        return self._decoder.forward(self._step(shape), self._cache)

    def _advance(self, shape: Shape, logits: Tensor, draw: Draw) -> None:
        """Draw, keep what was drawn, and make it the next step's input."""
        kernels = self._decoder.kernels
        _, lengths, _, seeds, top_k = self._numbers[:, : shape[0]]
        temperatures, top_p, min_p = self._heats[:, : shape[0]]
        filters = Filters(top_k, top_p, min_p) if draw.filtered else None
        penalties = self._penalties.of(shape[0]) if draw.penalised else None
        adjusted = logits
        if penalties is not None:
            adjusted = logits.to(torch.float32, copy=True)
            kernels.penalise(adjusted, penalties)
        drawn = kernels.sample(adjusted, temperatures, seeds, lengths, filters)
        if penalties is not None:
            kernels.count_tokens(penalties, drawn)
        if draw.scored:
            kernels.advance(self._rows(shape), drawn, logits, kernels.normalisers(logits))
        else:
            kernels.advance(self._rows(shape), drawn)

    def _prepare(self, shape: Shape) -> None:
        """Capture a step of this shape, unless that was done. One without memory for its graphs does without for
        a while: who took it, another process perhaps, may give it back."""
        if not self._captures or shape in self._graphs or self._pauses.last(shape):
            return
        numbers = self._numbers.clone()  # of a launch that may still run
        self._numbers.zero_()  # limits of 0: nothing is seen and nothing is stored
        lengths = self._penalties.clear()
        self._shared.zero_()  # it may name rows that this shape lacks, and is written anew for every launch
        torch.cuda.empty_cache()  # a capture gets nothing of what is merely kept for others
        try:
            self._graphs[shape] = self._captured(shape)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            self._pauses.begin(shape)
            reason = str(error).split("\n")[0]
            logger.warning("steps of %d rows and %d pages run without a graph: %s", *shape[:2], reason)
        finally:
            self._numbers.copy_(numbers)
            self._penalties.restore(lengths)

    def _captured(self, shape: Shape) -> Graphs:
        assert self._aside is not None
        ours = torch.cuda.current_stream(self._device)
        self._aside.wait_stream(ours)
        try:
            with _uncollected(), torch.cuda.stream(self._aside):
                self._decoder.kernels.advance(self._rows(shape), None)
                logits = self._compute(shape)
                for draw in DRAWS:
                    self._advance(shape, logits, draw)  # compiles and allocates what a capture must not
                    self._counts.zero_()
                with self._capture() as forward:
                    logits = self._compute(shape)
                draws = {}
                for draw in DRAWS:
                    with self._capture() as draws[draw]:
                        self._advance(shape, logits, draw)
                with self._capture() as keep:
                    self._logits[: shape[0]].copy_(logits)
        finally:
            ours.wait_stream(self._aside)
        return Graphs(forward, draws, keep)

    @contextmanager
    def _capture(self) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
        try:
            yield graph
        finally:
            graph.capture_end()

    # --- shapes ---------------------------------------------------------------------------------------------

    def _bucket(self, rows: int) -> int:
        """On a GPU few kinds, two an octave: a row that is padding costs its share of products and nothing else."""
        if self._captures:
            octave = 1 << (rows - 1).bit_length()
            rows = octave * 3 // 4 if octave > 16 and rows <= octave * 3 // 4 else octave
        return -(-rows // self._row_multiple) * self._row_multiple

    def _table(self, shape: Shape) -> Tensor:
        return self._tables[: shape[0] * shape[1]].view(shape[:2])

    def _zeros(self, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self._device)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Python's garbage waits: a graph of an engine that is gone, freed in the middle of a capture, ends it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _power_of_two(pages: int) -> int:
    return max(LEAST_PAGES, 1 << (pages - 1).bit_length())
