"""Checkpoint: where a model's files are, what kind they are and what model they describe.

Owns finding them: a folder, a GGUF file or a hub id. Knows no tensors (that is `weights`) and never loads
torch, so that the worker can read a model's limits and its tokenizer files in milliseconds.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine import families, gguf_file
from engine.config import ModelConfig
from engine.families import UnsupportedCheckpoint

__all__ = ["Checkpoint", "UnsupportedCheckpoint"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`path` is the folder of safetensors, or the GGUF file itself; `files` are those that hold weights."""

    path: Path
    kind: Literal["safetensors", "gguf"]
    files: tuple[Path, ...]
    config: ModelConfig

    @classmethod
    def open(cls, model: str, revision: str | None = None) -> Checkpoint:
        """Resolve `model` and read its configuration, no weights.

        `model` is a folder with config.json and safetensors (one file, or shards with
        model.safetensors.index.json), a GGUF file, a folder with exactly one GGUF file and no safetensors, or
        a Hugging Face hub id, downloaded once at `revision`. Raises `UnsupportedCheckpoint`, which says why.
        """
        path = Path(model).expanduser()
        if path.is_file():
            if path.suffix != ".gguf":
                raise UnsupportedCheckpoint(f"{model}: a single file must be a .gguf file")
            return cls._gguf(path)
        if path.is_dir():
            return cls._folder(path)
        if path.is_absolute() or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
            raise UnsupportedCheckpoint(f"{model}: no such file or folder")
        return cls._folder(_download(model, revision))

    @classmethod
    def _gguf(cls, path: Path) -> Checkpoint:
        return cls(path=path, kind="gguf", files=(path,), config=gguf_file.GGUFFile.open(path).model_config())

    @classmethod
    def _folder(cls, folder: Path) -> Checkpoint:
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            found = sorted(folder.glob("*.gguf"))
            if len(found) == 1:
                return cls._gguf(found[0])
            raise UnsupportedCheckpoint(
                f"{folder}: needs *.safetensors, or exactly one *.gguf (found {len(found)})"
            )
        config = _read_json(folder / "config.json")
        if config is None:
            raise UnsupportedCheckpoint(f"{folder}: config.json is missing")
        generation = _read_json(folder / "generation_config.json")
        return cls(
            path=folder,
            kind="safetensors",
            files=_weight_files(folder),
            config=families.model_config(config, generation),
        )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    # The index wins over a glob: repositories may carry a second, consolidated copy of the weights
    index = _read_json(folder / "model.safetensors.index.json")
    if index is None:
        single = folder / "model.safetensors"
        if single.is_file():
            return (single,)
        raise UnsupportedCheckpoint(
            f"{folder}: needs model.safetensors, or shards with model.safetensors.index.json"
        )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedCheckpoint(f"{folder}: model.safetensors.index.json has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UnsupportedCheckpoint(f"{folder}: the shard {name} named in the index is missing")
    return tuple(folder / name for name in names)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UnsupportedCheckpoint(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UnsupportedCheckpoint(f"{path} must hold a JSON object")
    return value


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's errors share no base class: offline, missing, private, bad id
        raise UnsupportedCheckpoint(
            f"{model}: no such folder, and the hub did not give it: {error}"
        ) from error
