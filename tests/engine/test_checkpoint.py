"""Where a model's files are found, and what is said when they are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from engine.checkpoint import _HUB_FILES, _HUB_FOLDERS, Checkpoint, UnsupportedCheckpoint
from tests.support.tiny import write_tiny_llama


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write_tiny_llama(tmp_path)))
    assert (checkpoint.kind, checkpoint.path) == ("safetensors", tmp_path)
    assert [path.name for path in checkpoint.files] == ["model.safetensors"]
    assert checkpoint.config.eos_token_ids == (2,)


def test_the_index_names_the_shards_and_nothing_else_is_read(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, num_shards=3)
    (tmp_path / "consolidated.safetensors").write_bytes(b"a second copy of the weights")
    files = Checkpoint.open(str(tmp_path)).files
    assert [path.name for path in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UnsupportedCheckpoint, match="model-00002-of-00002"):
        Checkpoint.open(str(tmp_path))


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model", num_shards=2)
    (tmp_path / "outside.safetensors").write_bytes(b"")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedCheckpoint, match="outside"):
        Checkpoint.open(str(tmp_path / "model"))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="no such file or folder"):
        Checkpoint.open(str(tmp_path / "nowhere"))
    with pytest.raises(UnsupportedCheckpoint, match="safetensors"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json is missing"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedCheckpoint, match="not valid JSON"):
        Checkpoint.open(str(tmp_path))
    with pytest.raises(UnsupportedCheckpoint, match="gguf"):
        Checkpoint.open(str(tmp_path / "config.json"))


def test_two_gguf_files_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UnsupportedCheckpoint, match="found 2"):
        Checkpoint.open(str(tmp_path))


def test_an_unreachable_hub_id_is_one_clear_error() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="nobody/no-such-model-here"):
        Checkpoint.open("nobody/no-such-model-here")


def test_of_a_hub_repository_no_second_copy_of_the_weights_is_fetched() -> None:
    """gpt-oss has them again in `original`, in names of its own, and once more in `metal`."""
    files = ["config.json", "chat_template.jinja", "model-00000-of-00002.safetensors", "tokenizer.json"]
    others = ["original/model.safetensors", "original/config.json", "metal/model.bin", "README.md"]
    found = filter_repo_objects(files + others, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FOLDERS)
    assert list(found) == files


def test_reading_a_checkpoint_never_loads_torch(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    code = (
        "import sys; from engine.checkpoint import Checkpoint; Checkpoint.open(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'safetensors', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
