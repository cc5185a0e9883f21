"""Placement: which stored tensor goes to which rows of which parameter, and in what layout.

Owns the way from the file's names to the decoder's, which `Storage` describes, and the demand that every tensor of
the file is used and every parameter of the model is filled, made before the first byte of a weight is read. Moves no
bytes (`weights` does) and knows no format of quantised modules (`quantised_source`).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from torch import Tensor

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.model import Decoder
from engine.model_config import ModelConfig, Storage
from engine.parameters import parameter_shapes
from engine.weight_source import WeightSource
from kernels.weights import ExpertsWeight, KeptWeight

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# what one tensor of all experts holds: the end of its name, the modules that share it, and which part of them it is
_OF_EXPERTS = (
    (".experts.gate_up_proj", ("gate_proj", "up_proj"), "weight"),
    (".experts.down_proj", ("down_proj",), "weight"),
    (".experts.gate_up_proj_bias", ("gate_proj", "up_proj"), "bias"),
    (".experts.down_proj_bias", ("down_proj",), "bias"),
)


Layout = Literal[
    "rows",  # as the parameter's
    "transposed",  # [in, out]
    "grouped",  # q, k and v kv head by kv head
    "pairs",  # in each head, channels that turn together side by side
    "experts",  # [E, out, in], the gates of an expert above its ups
    "experts_transposed",  # [E, in, out]
    "experts_alternating",  # [E, in, out], a gate before each up
    "repeated",  # as the parameter's, which another tensor fills: a tied head
]


class Target(NamedTuple):
    """Rows `start` to `end` of the parameter `name` take one tensor of the checkpoint."""

    name: str
    start: int
    end: int
    layout: Layout = "rows"  # of what is no tensor of all experts


class Place(NamedTuple):
    """Where one stored tensor goes: into rows of a parameter, or, expert by expert, into one parameter each."""

    parameters: tuple[Tensor, ...]
    layout: Layout
    kept: KeptWeight | None = None  # of these rows, or experts; then the parameters have no memory

    @property
    def by_expert(self) -> bool:
        return self.layout.startswith("experts")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        shape = tuple(self.parameters[0].shape)
        if self.layout in ("transposed", "experts_transposed", "experts_alternating"):
            shape = shape[::-1]
        return (len(self.parameters), *shape) if self.by_expert else shape


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
        start = 0
        for part, size in parts:
            layout = _layout(part, storage)
            targets[name.replace(module, part)] = Target(name, start, start + size, layout)
            start += size
    return targets


def _layout(module: str, storage: Storage) -> Layout:
    """Of a module's tensors."""
    if module == "qkv_proj" and storage.qkv == "grouped":
        return "grouped"
    if module in ("q_proj", "k_proj") and storage.rotary == "pairs":
        return "pairs"
    return "rows"


def placed(
    source: WeightSource, targets: dict[str, Target], decoder: Decoder, checkpoint: Checkpoint
) -> dict[str, Place]:
    """Stored name → where it goes, in the file's order, but for those that carry nothing of their own.

    Raises `UnsupportedCheckpoint` naming the tensor that is unknown, stored twice, missing, or of a wrong shape or
    dtype.
    """
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
        # gate and up of an expert are one parameter
        whole = dict.fromkeys(targets[one].name for one in names)
        parameters = tuple(decoder.parameters[one] for one in whole)
        stack = decoder.quantised.get(f"{name}.weight")
        if decoder.config.storage.experts == "stacked":
            return Place(parameters, "experts", stack)
        if ".gate_up_proj" in name:
            return Place(parameters, "experts_alternating", stack)
        return Place(parameters, "experts_transposed", stack)
    target = targets[name]
    rows = decoder.parameters[target.name][target.start : target.end]
    if (kept := decoder.quantised.get(target.name)) is not None:
        assert not isinstance(kept, ExpertsWeight)  # those are of all experts
        return Place((rows,), "rows", kept.rows(target.start, target.end))
    if decoder.config.storage.transposed and name.startswith("model.layers.") and rows.dim() == 2:
        return Place((rows,), "transposed")
    return Place((rows,), target.layout)
