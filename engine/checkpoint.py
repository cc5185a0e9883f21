"""Checkpoint: where a model's files are, what kind they are and what model they describe.

Owns finding them: a folder, a GGUF file or a hub id, and the refusal of what cannot be run, with what to do about it,
before any weight is read. Knows no tensors' meaning (that is `weights`) and never loads torch, so that the worker can
read a model's limits and its tokenizer files in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine import config_json, foreign, gguf_file
from engine.config import ModelImpl
from engine.families import FAMILIES
from engine.model_config import ModelConfig, UnsupportedCheckpoint
from engine.quantisation import Float4Blocks, Quantisation, read_quantisation
from engine.safetensors_file import SafetensorsFile

__all__ = ["Checkpoint", "UnsupportedCheckpoint"]

_SAMPLES = 16  # of each file of weights, evenly spread
_SAMPLE_BYTES = 65_536
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_HUB_FOLDERS = ["*/*"]  # none: some hold a second copy of all weights, such as gpt-oss's `original`


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`path` is the folder of safetensors, or the GGUF file itself; `files` are those that hold weights."""

    path: Path
    kind: Literal["safetensors", "gguf"]
    files: tuple[Path, ...]
    config: ModelConfig
    quantisation: Quantisation | None = None  # how safetensors store their weights; None: plainly

    @classmethod
    def open(cls, model: str, revision: str | None = None, *, model_impl: ModelImpl = "auto") -> Checkpoint:
        """Resolve `model` and read its configuration, no weights.

        `model` is a folder with config.json and safetensors (one file, or shards with
        model.safetensors.index.json), a GGUF file, a folder with exactly one GGUF file and no safetensors, or
        a Hugging Face hub id, downloaded once at `revision`. `model_impl` says whose code is to compute it: ours,
        that of transformers, or ours where it knows the architecture. Raises `UnsupportedCheckpoint`, which
        says why.
        """
        path = Path(model).expanduser()
        if path.is_file():
            if path.suffix != ".gguf":
                raise UnsupportedCheckpoint(f"{model}: a single file must be a .gguf file")
            return cls._gguf(path, model_impl)
        if path.is_dir():
            return cls._folder(path, model_impl)
        if not is_hub_id(model):
            raise UnsupportedCheckpoint(f"{model}: no such file or folder")
        return cls._folder(_download(model, revision), model_impl)

    def fingerprint(self) -> str:
        """64 hex digits that change with the weights: SHA-256 over every file's name, size and sixteen samples of
        64 KiB, and config.json. Tokens that one model made are not to be continued by another."""
        digest = hashlib.sha256()
        if self.kind == "safetensors":
            digest.update((self.path / "config.json").read_bytes())
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for sample in range(_SAMPLES):
                    file.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    @classmethod
    def _gguf(cls, path: Path, model_impl: ModelImpl) -> Checkpoint:
        if model_impl == "transformers":
            raise UnsupportedCheckpoint(f"{path}: model_impl transformers needs a folder of safetensors")
        return cls(path=path, kind="gguf", files=(path,), config=gguf_file.GGUFFile.open(path).model_config())

    @classmethod
    def _folder(cls, folder: Path, model_impl: ModelImpl) -> Checkpoint:
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            found = sorted(folder.glob("*.gguf"))
            if len(found) == 1:
                return cls._gguf(found[0], model_impl)
            raise UnsupportedCheckpoint(f"{folder}: {_without_weights(folder, len(found))}")
        if {path.name for path in shards} <= {"adapter_model.safetensors"}:
            raise UnsupportedCheckpoint(f"{folder}: {_without_weights(folder, 0)}")
        path = folder / "config.json"
        config = _read_json(path)
        if config is None:
            raise UnsupportedCheckpoint(f"{folder}: config.json is missing")
        generation = _read_json(folder / "generation_config.json")
        try:
            known = config_json.only_architecture(config) in FAMILIES
            ours = model_impl == "nightpress" or (model_impl == "auto" and known)
            model = (config_json if ours else foreign).model_config(config, generation)
            quantisation = read_quantisation(config)
            if quantisation is not None and model.storage.transposed:
                raise UnsupportedCheckpoint(
                    f"quantization_config ({quantisation.method}) is not supported for {model.architecture}, whose "
                    "matrices are stored transposed; use the original weights, or a GGUF file of them"
                )
            if isinstance(quantisation, Float4Blocks) and model.storage.experts != "alternating":
                raise UnsupportedCheckpoint(
                    f"quantization_config (mxfp4) is not supported for {model.architecture}, but for the experts of "
                    "GptOssForCausalLM; use the original weights, or a GGUF file of them"
                )
        except UnsupportedCheckpoint as error:
            raise UnsupportedCheckpoint(f"{path}: {error}") from None
        files = _weight_files(folder)
        for file in files:
            SafetensorsFile.open(file)  # a file that is cut short says so now
        return cls(path=folder, kind="safetensors", files=files, config=model, quantisation=quantisation)


def is_hub_id(model: str) -> bool:
    """Whether `model` would be looked for on the hub: it is no file or folder here, and could not be one."""
    is_path = model.startswith(("/", ".", "~")) or _HUB_ID.fullmatch(model) is None
    return not is_path and not Path(model).exists()


def _without_weights(folder: Path, num_gguf: int) -> str:
    """What the folder holds instead of weights, and what to do."""
    if (folder / "adapter_config.json").is_file() or (folder / "adapter_model.safetensors").is_file():
        adapter = _read_json(folder / "adapter_config.json") or {}
        return (
            f"an adapter (adapter_config.json, for {adapter.get('base_model_name_or_path', 'a base model')}), "
            "no whole model: merge it into its base, as peft's merge_and_unload does, and save the result"
        )
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"{pickled[0]} is a pickle, which can run any code and is not opened: convert it, as "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other) does"
        )
    return f"needs *.safetensors, or exactly one *.gguf (found {num_gguf})"


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
    except (ValueError, RecursionError) as error:
        raise UnsupportedCheckpoint(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise UnsupportedCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(value, dict):
        raise UnsupportedCheckpoint(f"{path} must hold a JSON object")
    return value


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FOLDERS
            )
        )
    except Exception as error:  # the hub's errors share no base class: offline, missing, private, bad id
        raise UnsupportedCheckpoint(
            f"{model}: no such folder, and the hub did not give it; without a network, name the path of a folder "
            f"or GGUF file: {error}"
        ) from error
