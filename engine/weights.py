"""Fills a decoder's parameters from a checkpoint, strictly.

Owns the merging of q, k, v and gate, up where the file holds them apart, and the demand that every tensor of the
file is used and every parameter of the model is filled. Knows no mathematics. Tensors are copied out of a memory
map one at a time, so loading needs little more memory than the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.config import ModelConfig
from engine.gguf_file import GGUFFile
from engine.model import Decoder


class Target(NamedTuple):
    """Rows `start` to `end` of the parameter `name` take one tensor of the checkpoint."""

    name: str
    start: int
    end: int


def load_weights(decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Copy every tensor, converted to the decoder's dtype.

    Raises `UnsupportedCheckpoint` naming the tensor that is unknown, missing, double or of a wrong shape.
    """
    targets = weight_targets(decoder)
    waiting = set(targets)
    for name, tensor in _tensors(checkpoint):
        target = targets.get(name)
        if target is None:
            if _is_derived(name, decoder.config):
                continue
            raise UnsupportedCheckpoint(f"{checkpoint.path}: tensor {name} is not known")
        if name not in waiting:
            raise UnsupportedCheckpoint(f"{checkpoint.path}: tensor {name} is there twice")
        parameter = decoder.parameters[target.name][target.start : target.end]
        if tensor.shape != parameter.shape:
            found, wanted = tuple(tensor.shape), tuple(parameter.shape)
            raise UnsupportedCheckpoint(f"{checkpoint.path}: tensor {name} has shape {found}, not {wanted}")
        parameter.copy_(tensor)
        waiting.remove(name)
    if waiting:
        raise UnsupportedCheckpoint(f"{checkpoint.path}: tensor {min(waiting)} is missing")


def weight_targets(decoder: Decoder) -> dict[str, Target]:
    """The checkpoint's tensor name → where it goes."""
    config = decoder.config
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    merged = {
        "qkv_proj": (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)),
        "gate_up_proj": (("gate_proj", inner), ("up_proj", inner)),
    }
    targets: dict[str, Target] = {}
    for name, parameter in decoder.parameters.items():
        module = name.split(".")[-2]
        if config.merged_weights or module not in merged:
            targets[name] = Target(name, 0, parameter.shape[0])
            continue
        start = 0
        for part, size in merged[module]:
            targets[name.replace(module, part)] = Target(name, start, start + size)
            start += size
    return targets


def _is_derived(name: str, config: ModelConfig) -> bool:
    # Old checkpoints store the rope frequencies; some tied ones store the head a second time
    return name.endswith(".rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    if checkpoint.kind == "gguf":
        threads = torch.get_num_threads()
        for name, array in GGUFFile.open(checkpoint.path).weights(threads):
            yield name, torch.from_numpy(array)
        return
    from safetensors import SafetensorError, safe_open

    for path in checkpoint.files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UnsupportedCheckpoint(f"{path} is not readable: {error}") from None
