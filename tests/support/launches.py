"""Launches: everything that a device would be asked to do for one step of decoding, counted without a device.

Owns the list: the triton kernels that run in the interpreter, and the operations of torch that are more than views or
fresh memory, each of which is a node of the step's CUDA graph. A product of the library is one node here; how many
kernels cuBLAS makes of it only a GPU can say. Knows nothing of how long anything takes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from engine.cache import KVCache
from engine.checkpoint import Checkpoint
from engine.decode_steps import DecodeSteps, Draw
from engine.model import Decoder
from engine.plan import Row
from engine.runner import load_decoder
from engine.sampling_params import SamplingParams
from kernels import kernels_for
from tests.support.families import write_tiny
from tests.support.rollout import sequence
from tests.support.tree import ROOT

PAGE, ROWS = 64, 3  # pages as on a GPU, so that contexts have as many splits as there
OURS = tuple(str(ROOT / package) for package in ("engine", "kernels"))
NO_WORK = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}
GREEDY: Mapping[str, Any] = {"temperature": 0.0}
QWEN3: Mapping[str, Any] = {"head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 4096}


class Launch(NamedTuple):
    """`origin`: file and line of ours that asked for it."""

    name: str
    origin: str


class _Operations(TorchDispatchMode):
    """Notes the operations of torch; in the middle of a kernel none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Launch] = []
        self.inside = False

    def note(self, name: str) -> None:
        self.found.append(Launch(name, _origin(sys._getframe(1))))

    def __torch_dispatch__(
        self, operation: OpOverload, types: Any, args: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        options = options or {}
        if self.inside:
            return operation(*args, **options)
        with self:  # of what torch makes of others, those
            made = operation.decompose(*args, **options)
        if made is not NotImplemented:
            return made
        if not operation.is_view and operation.name().partition(".")[0] not in NO_WORK:
            self.note(operation.name().removeprefix("aten::"))
        return operation(*args, **options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched inside, in its order."""
    operations, run = _Operations(), GridExecutor.__call__

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        operations.note(self.fn.__name__)
        operations.inside = True
        try:
            return run(self, *args, **options)
        finally:
            operations.inside = False

    GridExecutor.__call__ = noted
    try:
        with operations:
            yield operations.found
    finally:
        GridExecutor.__call__ = run


def _origin(frame: FrameType | None) -> str:
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def step_launches(folder: Path, *, layers: int, asked: Mapping[str, Any] = GREEDY) -> list[Launch]:
    """Of a step of a tiny model of Qwen3's kind, as a graph for short contexts holds it. `asked`: by each row."""
    write_tiny(folder, "Qwen3ForCausalLM", {**QWEN3, "num_hidden_layers": layers})
    config = Checkpoint.open(str(folder)).config
    kernels = kernels_for("cpu", "triton")
    with torch.inference_mode():
        decoder = load_decoder(Checkpoint.open(str(folder)), kernels, dtype=torch.float32, device="cpu")
        assert isinstance(decoder, Decoder)
        decoder.prepare(config.max_position)
        cache = KVCache.allocate(config, ROWS, PAGE, dtype=torch.float32, device="cpu", keys_by_token=True)
        steps = DecodeSteps(
            decoder, cache, page_size=PAGE, most_rows=ROWS, most_pages=32, most_steps=2, row_multiple=1
        )
        rows = tuple(_row(number, asked) for number in range(ROWS))
        steps.launch(rows, 1)  # what is made once is made
        shape, draw = steps._write(rows, 1), Draw.of(rows)
        with recorded() as found:
            steps._advance(shape, steps._compute(shape), draw)
    return found


def _row(number: int, asked: Mapping[str, Any]) -> Row:
    """One that computes its last token, in a page of its own."""
    one = sequence(range(3, 9 + number), SamplingParams(seed=number, max_tokens=9, **asked), number)
    one.num_computed = len(one.token_ids) - 1
    one.pages = [number]
    return Row(one, 1)
