"""Fills a decoder's parameters from a checkpoint, strictly.

Owns the copying, by a few threads, a piece at a time, into the parameters themselves, so that loading needs little
more memory than the model; and the change of layout on the way. A tied head that is stored a second time must be the
embedding. Where each tensor goes is decided before (`placement`). Knows no mathematics and no files' formats
(`weight_source`).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.load_progress import LoadProgress
from engine.model import Decoder
from engine.model_config import ModelConfig
from engine.placement import Place, placed, weight_targets
from engine.quantised_source import QuantisedSource
from engine.weight_source import WeightSource, open_source
from kernels.weights import Float4Weight

READERS = 8  # threads: fewer would do for copying, more keep a fast disk busy
_HUGE_PAGE_BYTES = 2 * 2**20


class Piece(NamedTuple):
    """Rows `start` to `end` of one tensor of the checkpoint."""

    name: str
    start: int
    end: int
    num_bytes: int  # in the file


def load_weights(
    decoder: Decoder, checkpoint: Checkpoint, *, source: WeightSource | None = None, bar: bool = False
) -> None:
    """Copy every tensor, converted to the decoder's dtype. `source`: the checkpoint's, if somebody has made it.
    `bar`: show one where a terminal is.

    Raises `UnsupportedCheckpoint`, before anything is read, naming a tensor that is unknown, stored twice or of a
    wrong shape or dtype, or, by Llama's name for it, one that is missing. A tied head that differs from the embedding
    is named when all else has been read.
    """
    targets = weight_targets(decoder.config)
    source = source or open_source(checkpoint, targets)
    places = placed(source, targets, decoder, checkpoint)
    for parameter in decoder.parameters.values():
        _advise_huge_pages(parameter)

    def copy(piece: Piece) -> int:
        with torch.inference_mode():  # it is a property of the thread
            if places[piece.name].layout == "repeated":
                _compare(source, piece, places[piece.name], checkpoint)
            else:
                _copy(source, piece, places[piece.name], decoder.config)
        return piece.num_bytes

    pieces = [piece for name, place in places.items() for piece in _pieces(source, name, place)]
    total = sum(piece.num_bytes for piece in pieces)
    with (
        LoadProgress(checkpoint.path, total, bar=bar) as progress,
        source,
        ThreadPoolExecutor(READERS, thread_name_prefix="load") as pool,
    ):
        for repeated in (False, True):  # a tied head is compared once the embedding is there
            some = [piece for piece in pieces if (places[piece.name].layout == "repeated") is repeated]
            for num_bytes in pool.map(copy, some):  # the first failure cancels the rest
                progress.advance(num_bytes)


def _pieces(source: WeightSource, name: str, place: Place) -> Iterator[Piece]:
    """The tensor in pieces of about `piece_bytes`, in the order of the file; whole where its layout changes."""
    shape, num_bytes = source.tensors[name]
    rows = shape[0]
    if place.by_expert:
        rows = 1
    elif place.layout in ("rows", "repeated"):
        unit = source.unit(name)
        rows = max(unit, source.piece_bytes * shape[0] // num_bytes // unit * unit)
    for start in range(0, shape[0], rows):
        end = min(start + rows, shape[0])
        yield Piece(name, start, end, num_bytes * (end - start) // shape[0])


def _copy(source: WeightSource, piece: Piece, place: Place, config: ModelConfig) -> None:
    name, start, end, _ = piece
    if place.by_expert:
        if place.kept is not None:
            return _keep_expert(source, name, start, place)
        return _copy_expert(source, name, start, place)
    (rows,) = place.parameters
    if place.kept is not None:
        assert isinstance(source, QuantisedSource)
        return source.keep(name, start, end, place.kept)
    if place.layout == "rows":
        return source.copy(name, start, end, rows[start:end])
    stored = rows.new_empty(place.stored_shape)
    source.copy(name, start, end, stored)
    if place.layout == "transposed":
        rows.copy_(stored.t())
    else:
        rows.copy_(_ungrouped(stored, config) if place.layout == "grouped" else _in_halves(stored, config))


def _copy_expert(source: WeightSource, name: str, expert: int, place: Place) -> None:
    rows = place.parameters[expert]
    if place.layout != "experts_alternating":
        stored = rows if place.layout == "experts" or rows.dim() == 1 else rows.t()
        return source.copy(name, expert, expert + 1, stored[None])
    alternating = torch.empty_like(rows)  # [2·I, H], or of a bias [2·I]
    stored = alternating if rows.dim() == 1 else alternating.t()
    source.copy(name, expert, expert + 1, stored[None])
    _copy_apart(alternating, rows)


def _keep_expert(source: WeightSource, name: str, expert: int, place: Place) -> None:
    assert isinstance(source, QuantisedSource)
    assert isinstance(place.kept, Float4Weight)
    kept = place.kept.experts(expert, expert + 1)
    if place.layout != "experts_alternating":
        return source.keep(name, expert, expert + 1, kept)
    alternating = Float4Weight.empty(*kept.shape, device=kept.words.device)
    source.keep(name, expert, expert + 1, alternating)
    for theirs, ours in ((alternating.words, kept.words), (alternating.scales, kept.scales)):
        _copy_apart(theirs[0].transpose(0, 1), ours[0].transpose(0, 1))  # [2·I, H / 32, ...]


def _copy_apart(alternating: Tensor, rows: Tensor) -> None:
    """`[2·I, ...]` of gates and ups in turn into `rows`, the gates above the ups."""
    pairs = alternating.view(-1, 2, *rows.shape[1:])
    rows.view(2, -1, *rows.shape[1:]).copy_(pairs.transpose(0, 1))


def _compare(source: WeightSource, piece: Piece, place: Place, checkpoint: Checkpoint) -> None:
    name, start, end, _ = piece
    (parameter,) = place.parameters
    rows, again = parameter[start:end], torch.empty_like(parameter[start:end])
    source.copy(name, start, end, again)
    if not torch.equal(again.view(torch.uint8), rows.view(torch.uint8)):  # bits: NaN is equal to itself
        raise UnsupportedCheckpoint(
            f"{checkpoint.path}: tensor {name} differs from the embedding, though tie_word_embeddings is true. "
            "Set it to false in config.json to use the tensor, as transformers does, or take the tensor out"
        )


def _ungrouped(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows `[hk, hq / hk + 2, d]`, each kv head with its q heads, k and v → all of q, then k, then v."""
    rows = tensor.view(config.num_kv_heads, -1, config.head_dim, *tensor.shape[1:])
    group = rows.shape[1] - 2
    parts = rows[:, :group], rows[:, group : group + 1], rows[:, group + 1 :]
    return torch.cat([part.flatten(0, 2) for part in parts])


def _in_halves(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows `[heads, d]` whose rotated channels lie in pairs → the first of each pair, the second, then the others."""
    heads = tensor.view(-1, config.head_dim, *tensor.shape[1:])
    turned, others = heads[:, : config.rotary_dim], heads[:, config.rotary_dim :]
    return torch.cat((turned[:, 0::2], turned[:, 1::2], others), dim=1).flatten(0, 1)


def _advise_huge_pages(parameter: Tensor) -> None:
    """Fresh memory is handed out by the kernel page by page while it is filled, which takes longer than the reading:
    with pages of 2 MiB instead of 4 KiB loading was three times as fast. Only advice; it may be ignored."""
    if parameter.device.type != "cpu" or sys.platform != "linux":
        return
    first, last = parameter.data_ptr(), parameter.data_ptr() + parameter.numel() * parameter.element_size()
    start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if end - start >= _HUGE_PAGE_BYTES:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
