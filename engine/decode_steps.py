"""DecodeSteps: steps in which every row computes its last token, run without the host.

Owns their launches. On a GPU a step is captured once for a shape of its inputs and then replayed (CUDA graphs); a
token that was drawn is the next step's input. Between two steps nothing is asked of the host, and what was drawn
comes back after the last. Knows no plans' reasons (`multi_step`), not how inputs are laid out (`decode_inputs`), and
no kernels' insides.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product, starmap
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from engine.cache import KVCache
from engine.decode_inputs import DecodeInputs, Shape
from engine.model import Decoder
from engine.penalties import KeptPenalties
from engine.plan import Row
from engine.shortage import Pauses, is_shortage
from kernels import Sharing

if TYPE_CHECKING:
    from engine.fallback import Fallback

logger = logging.getLogger(__name__)


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
    """`most_rows` and `most_pages`: of a plan, and of a row. `most_steps`: that are run together. `row_multiple` and
    `sharing` as `DecodeInputs` takes them."""

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
        self._device = torch.device(decoder.device)
        self._captures = self._device.type == "cuda" and decoder.capturable
        self._inputs = DecodeInputs(
            self._device,
            page_size=page_size,
            most_rows=most_rows,
            most_pages=most_pages,
            most_steps=most_steps,
            row_multiple=row_multiple,
            in_octaves=self._captures,
            sharing=sharing,
        )
        self._graphs: dict[Shape, Graphs] = {}
        self._pauses = Pauses[Shape]()  # counted in launches, of captures that found no memory
        self._memory = torch.cuda.graph_pool_handle() if self._captures else None
        # one for all captures: products keep some memory for every stream that they have met
        self._aside = torch.cuda.Stream(self._device) if self._captures else None  # type: ignore[no-untyped-call]
        vocab_size = decoder.config.vocab_size
        with torch.inference_mode():
            self._penalties = KeptPenalties(
                self._inputs.num_rows,
                most_new=2 * most_steps,  # of a launch and one behind it
                most_distinct=min(most_pages * page_size, vocab_size),
                device=self._device,
            )
            kept = self._inputs.num_rows if self._captures else 0
            self._logits = torch.zeros((kept, vocab_size), dtype=decoder.dtype, device=self._device)

    @property
    def captures(self) -> bool:
        """Whether steps are replayed from graphs."""
        return self._captures

    def capture(self) -> None:
        """Make the graphs of short contexts, for every number of rows, the largest first: they share its memory.
        Those of longer ones are made when they are met. Nothing where no graph is used."""
        if self._captures:
            with torch.inference_mode():
                for shape in self._inputs.short_shapes():
                    self._prepare(shape)

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
        made, logprobs = self._inputs.drawn(num_steps, len(rows))
        return Drawn(made, logprobs if draw.scored else None)

    def logits(self, rows: tuple[Row, ...]) -> Tensor:
        """`[len(rows), vocab]` behind each row's last token, which is stored; valid until the next call."""
        shape = self._write(rows, 1)
        graphs = self._graphs.get(shape)
        if graphs is None:
            return self._compute(shape)[: len(rows)]
        graphs.forward.replay()
        graphs.keep.replay()
        return self._logits[: len(rows)]

    # --- one step -------------------------------------------------------------------------------------------

    def _write(self, rows: tuple[Row, ...], num_steps: int, *, on: bool = False) -> Shape:
        sequences = [row.sequence for row in rows]
        extent = self._inputs.extent(sequences, num_steps)
        self._pauses.pass_one()
        self._prepare(extent.shape)
        self._inputs.write(sequences, extent, on=on)
        self._decoder.kernels.advance(self._inputs.rows(extent.shape), None)
        return extent.shape

    def _compute(self, shape: Shape) -> Tensor:
        return self._decoder.forward(self._inputs.step(shape), self._cache)

    def _advance(self, shape: Shape, logits: Tensor, draw: Draw) -> None:
        """Draw, keep what was drawn, and make it the next step's input."""
        kernels, inputs = self._decoder.kernels, self._inputs
        rows = inputs.rows(shape)
        penalties = self._penalties.of(shape[0]) if draw.penalised else None
        adjusted = logits
        if penalties is not None:
            adjusted = logits.to(torch.float32, copy=True)
            kernels.penalise(adjusted, penalties)
        filters = inputs.filters(shape) if draw.filtered else None
        drawn = kernels.sample(
            adjusted, inputs.temperatures(shape), inputs.seeds(shape), rows.lengths, filters
        )
        if penalties is not None:
            kernels.count_tokens(penalties, drawn)
        if draw.scored:
            kernels.advance(rows, drawn, logits, kernels.normalisers(logits))
        else:
            kernels.advance(rows, drawn)

    # --- graphs ---------------------------------------------------------------------------------------------

    def _prepare(self, shape: Shape) -> None:
        """Capture a step of this shape, unless that was done. One without memory for its graphs does without for
        a while: who took it, another process perhaps, may give it back."""
        if not self._captures or shape in self._graphs or self._pauses.last(shape):
            return
        numbers, lengths = self._inputs.clear(), self._penalties.clear()
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
            self._inputs.restore(numbers)
            self._penalties.restore(lengths)

    def _captured(self, shape: Shape) -> Graphs:
        assert self._aside is not None
        ours = torch.cuda.current_stream(self._device)
        self._aside.wait_stream(ours)
        try:
            with _uncollected(), torch.cuda.stream(self._aside):
                self._decoder.kernels.advance(self._inputs.rows(shape), None)
                logits = self._compute(shape)
                for draw in DRAWS:
                    self._advance(shape, logits, draw)  # compiles and allocates what a capture must not
                    self._inputs.rewind()
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
