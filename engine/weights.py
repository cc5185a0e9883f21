"""Fills a decoder's parameters from a checkpoint, strictly.

Owns the way from the file's names and layouts to the decoder's, which `Storage` describes, and the demand that every
tensor of the file is used and every parameter of the model is filled, made before the first byte of a weight is read.
A tied head that is stored a second time must be the embedding.
Weights that stay quantised (`kept_weights`) are filled as strictly. Knows no mathematics. A few threads copy pieces
into the parameters, so loading needs little more memory than the model.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.config import ModelConfig
from engine.load_progress import LoadProgress
from engine.model import Decoder
from engine.parameters import parameter_shapes
from engine.quantised_source import QuantisedSource
from engine.weight_source import WeightSource, open_source
from kernels.weights import QuantisedWeight

READERS = 8  # threads: fewer would do for copying, more keep a fast disk busy
_HUGE_PAGE_BYTES = 2 * 2**20
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# what one tensor of all experts holds: the end of its name, the modules that share it, and which part of them it is
_OF_EXPERTS = (
    (".experts.gate_up_proj", ("gate_proj", "up_proj"), "weight"),
    (".experts.down_proj", ("down_proj",), "weight"),
    (".experts.gate_up_proj_bias", ("gate_proj", "up_proj"), "bias"),
    (".experts.down_proj_bias", ("down_proj",), "bias"),
)


class Target(NamedTuple):
    """Rows `start` to `end` of the parameter `name` take one tensor of the checkpoint."""

    name: str
    start: int
    end: int
    grouped: bool = False  # they are stored kv head by kv head


class Place(NamedTuple):
    """Where one stored tensor goes: into a part of a parameter, or, row by row, into one `experts` parameter each.

    `layout`: `experts_transposed` are `[in, out]` each, `experts_alternating` too, and a gate lies before each up.
    `repeated`: they are there already.
    """

    parameters: tuple[Tensor, ...]
    layout: Literal[
        "rows",
        "transposed",
        "grouped",
        "experts",
        "experts_transposed",
        "experts_alternating",
        "repeated",
    ]
    kept: QuantisedWeight | None = None  # of these rows; then the parameter has no memory

    @property
    def stored_shape(self) -> tuple[int, ...]:
        shape = tuple(self.parameters[0].shape)
        if self.layout in ("transposed", "experts_transposed", "experts_alternating"):
            shape = shape[::-1]
        return (len(self.parameters), *shape) if self.layout.startswith("experts") else shape


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

    Raises `UnsupportedCheckpoint` naming the tensor that is unknown, double, of a wrong shape or dtype by its own
    name, one that is missing by Llama's name for it; then nothing has been read yet. A tied head that differs from
    the embedding is named when all else has been read.
    """
    targets = weight_targets(decoder.config)
    source = source or open_source(checkpoint, targets)
    places = _places(source, targets, decoder, checkpoint)
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
        for repeated in (False, True):
            some = [piece for piece in pieces if (places[piece.name].layout == "repeated") is repeated]
            for num_bytes in pool.map(copy, some):  # the first failure cancels the rest
                progress.advance(num_bytes)


def weight_targets(config: ModelConfig) -> dict[str, Target]:
    """The canonical name of a checkpoint's tensor → where it goes."""
    storage = config.storage
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    targets: dict[str, Target] = {}
    for name, shape in parameter_shapes(config).items():
        module, rows = name.split(".")[-2], shape[0]
        parts: tuple[tuple[str, int], ...] = ((module, rows),)
        if module == "qkv_proj" and storage.qkv == "apart":
            parts = (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
        elif module == "gate_up_proj" and storage.gate_up == "apart":
            parts = (("gate_proj", rows // 2), ("up_proj", rows // 2))
        start, grouped = 0, module == "qkv_proj" and storage.qkv == "grouped"
        for part, size in parts:
            targets[name.replace(module, part)] = Target(name, start, start + size, grouped)
            start += size
    return targets


def _places(
    source: WeightSource, targets: dict[str, Target], decoder: Decoder, checkpoint: Checkpoint
) -> dict[str, Place]:
    """Stored name → where it goes, in the file's order, of all that are no mere derivatives."""
    config = decoder.config
    waiting = set(targets)
    places: dict[str, Place] = {}
    for stored_name in source.tensors:
        name = canonical_name(stored_name, config)
        if name is None:
            continue
        if config.tied_embeddings and name == _HEAD:
            places[stored_name] = Place((decoder.parameters[_EMBEDDING],), "repeated")
            _check(source, stored_name, places[stored_name], checkpoint)
            continue
        names = _names_of_experts(name, decoder) or (name,)
        if any(one not in targets for one in names):
            if source.leave_out(stored_name):
                continue
            raise UnsupportedCheckpoint(f"{checkpoint.path}: tensor {stored_name} is not known")
        if not waiting.issuperset(names):
            raise UnsupportedCheckpoint(f"{checkpoint.path}: tensor {stored_name} is there twice")
        places[stored_name] = _place(name, names, targets, decoder)
        _check(source, stored_name, places[stored_name], checkpoint)
        waiting.difference_update(names)
    if waiting:
        raise UnsupportedCheckpoint(f"{checkpoint.path}: tensor {min(waiting)} is missing")
    return places


def _check(source: WeightSource, stored_name: str, place: Place, checkpoint: Checkpoint) -> None:
    source.check(stored_name)
    shape, _ = source.tensors[stored_name]
    if shape != place.stored_shape:
        raise UnsupportedCheckpoint(
            f"{checkpoint.path}: tensor {stored_name} has shape {shape}, not {place.stored_shape}"
        )


def canonical_name(stored_name: str, config: ModelConfig) -> str | None:
    """Llama's name for it; None for what is no weight of its own."""
    storage, name = config.storage, stored_name
    for pattern, replacement in storage.names:
        name = re.sub(pattern, replacement, name)
    # old checkpoints store the rope frequencies
    derived = stored_name.endswith(".rotary_emb.inv_freq") or (
        storage.derived and re.search(storage.derived, stored_name)
    )
    return None if derived else name


def _names_of_experts(name: str, decoder: Decoder) -> tuple[str, ...]:
    """transformers 5 may write all experts of a layer as one tensor, `[E, 2·I, H]` or `[E, H, I]`, some families do
    always: the targets of its parts, expert by expert. Empty: it is no such tensor."""
    moe = decoder.config.moe
    for end, modules, kind in _OF_EXPERTS:
        if moe is not None and name.endswith(end):
            part = name.rsplit(".", 1)[0]
            return tuple(f"{part}.{e}.{one}.{kind}" for e in range(moe.num_experts) for one in modules)
    return ()


def _place(name: str, names: tuple[str, ...], targets: dict[str, Target], decoder: Decoder) -> Place:
    if len(names) > 1 or names[0] != name:
        whole = dict.fromkeys(
            targets[one].name for one in names
        )  # gate and up of an expert are one parameter
        parameters = tuple(decoder.parameters[one] for one in whole)
        if decoder.config.storage.experts == "stacked":
            return Place(parameters, "experts")
        if ".gate_up_proj" in name:
            return Place(parameters, "experts_alternating")
        return Place(parameters, "experts_transposed")
    target = targets[name]
    rows = decoder.parameters[target.name][target.start : target.end]
    if (kept := decoder.quantised.get(target.name)) is not None:
        return Place((rows,), "rows", kept.rows(target.start, target.end))
    if decoder.config.storage.transposed and name.startswith("model.layers.") and rows.dim() == 2:
        return Place((rows,), "transposed")
    return Place((rows,), "grouped" if target.grouped else "rows")


def _pieces(source: WeightSource, name: str, place: Place) -> Iterator[Piece]:
    """The tensor in pieces of about `piece_bytes`, in the order of the file; whole where its layout changes."""
    shape, num_bytes = source.tensors[name]
    rows = shape[0]
    if place.layout.startswith("experts"):
        rows = 1
    elif place.layout in ("rows", "repeated"):
        unit = source.unit(name)
        rows = max(unit, source.piece_bytes * shape[0] // num_bytes // unit * unit)
    for start in range(0, shape[0], rows):
        end = min(start + rows, shape[0])
        yield Piece(name, start, end, num_bytes * (end - start) // shape[0])


def _copy(source: WeightSource, piece: Piece, place: Place, config: ModelConfig) -> None:
    name, start, end, _ = piece
    if place.layout.startswith("experts"):
        return _copy_expert(source, name, start, place)
    (rows,) = place.parameters
    if place.kept is not None:
        assert isinstance(source, QuantisedSource)
        return source.keep(name, start, end, place.kept)
    if place.layout == "rows":
        return source.copy(name, start, end, rows[start:end])
    stored = rows.new_empty(place.stored_shape)
    source.copy(name, start, end, stored)
    rows.copy_(stored.t() if place.layout == "transposed" else _ungrouped(stored, config))


def _copy_expert(source: WeightSource, name: str, expert: int, place: Place) -> None:
    rows = place.parameters[expert]
    if place.layout != "experts_alternating":
        stored = rows if place.layout == "experts" or rows.dim() == 1 else rows.t()
        return source.copy(name, expert, expert + 1, stored[None])
    alternating = torch.empty_like(rows)  # [2·I, H], or of a bias [2·I]
    stored = alternating if rows.dim() == 1 else alternating.t()
    source.copy(name, expert, expert + 1, stored[None])
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


def _advise_huge_pages(parameter: Tensor) -> None:
    """Fresh memory is handed out by the kernel page by page while it is filled, which takes longer than the reading:
    with pages of 2 MiB instead of 4 KiB loading was three times as fast. Only advice; it may be ignored."""
    if parameter.device.type != "cpu" or sys.platform != "linux":
        return
    first, last = parameter.data_ptr(), parameter.data_ptr() + parameter.numel() * parameter.element_size()
    start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if end - start >= _HUGE_PAGE_BYTES:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
