"""A checkpoint that cannot run says why before any weight is read: which file, which field, and what to do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.model import Decoder
from engine.tokenizer import Tokenizer
from engine.weight_source import _SafetensorsSource
from engine.weights import load_weights
from kernels.reference import KERNELS
from tests.support.tiny import write_tiny_llama

Damage = Callable[[Path], Any]
WEIGHTS = "model.safetensors"


def config(**fields: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def text(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def cut(count: int) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:count])


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def rewrite(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found = json.loads(data[8:end])
        change(found)
        new = json.dumps(found).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[end:])

    return rewrite


def instead_of_weights(**files: str) -> Damage:
    """`__` stands for a dot."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    return change


def stored_as(dtype: torch.dtype) -> Damage:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors["model.norm.weight"] = torch.ones(64).to(dtype)
        save_file(tensors, folder / WEIGHTS)

    return change


def index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"x": "../a.safetensors"}}')


def twice(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    shards = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(shards))


BROKEN: dict[str, tuple[Damage, str]] = {
    "empty": (cut(0), r"model\.safetensors is not readable: the header is cut short"),
    "cut in the header": (cut(40), r"model\.safetensors is not readable: the header is cut short.*Download"),
    "cut in the data": (cut(-100), r"model\.safetensors is not readable: the header speaks of \d+ bytes"),
    "too long": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"more"),
        r"model\.safetensors is not readable: the header speaks of",
    ),
    "header not JSON": (text(WEIGHTS, struct.pack("<Q", 4) + b"{{{{"), "is not readable"),
    "overlap": (
        header(lambda found: found["model.norm.weight"].update(data_offsets=[0, 256])),
        "does not begin where the one before it ends",
    ),
    "offsets against shape": (
        header(lambda found: found["model.norm.weight"].update(shape=[65])),
        r"tensor model\.norm\.weight of F32 and shape \(65,\) cannot have 256 bytes",
    ),
    "no offsets": (header(lambda found: found["model.norm.weight"].pop("data_offsets")), "data_offsets is missing"),
    "unknown dtype": (header(lambda found: found["model.norm.weight"].update(dtype="Q9")), "unknown dtype 'Q9'"),
    "int8": (stored_as(torch.int8), r"model\.norm\.weight is stored as I8; allowed: F64, F32, F16, BF16.*GGUF"),
    "fp8": (stored_as(torch.float8_e4m3fn), r"model\.norm\.weight is stored as F8_E4M3; allowed.*original weights"),
    "tensor twice": (twice, r"b\.safetensors: tensor \S+ is there twice"),
    "shard elsewhere": (index, r"the shard \.\./a\.safetensors named in the index is missing"),
    "pickle": (
        instead_of_weights(pytorch_model__bin="x"),
        r"pytorch_model\.bin is a pickle.*not opened: convert it.*save_pretrained",
    ),
    "adapter": (
        instead_of_weights(adapter_config__json='{"base_model_name_or_path": "org/base"}'),
        "an adapter .*for org/base.*merge_and_unload",
    ),
    "adapter in safetensors": (
        instead_of_weights(adapter_model__safetensors="", adapter_config__json="{}"),
        "an adapter .*for a base model",
    ),
    "gptq": (config(quantization_config={"quant_method": "gptq"}), r"config\.json: quantization_config \(gptq\)"),
    "awq": (config(quantization_config={"quant_method": "awq"}), r"quantization_config \(awq\).*original weights"),
    "sizes in words": (config(hidden_size="many"), r"config\.json.*hidden_size must be a number, not 'many'"),
    "a word for a switch": (config(tie_word_embeddings="false"), "must be true or false, not 'false'"),
    "a number for a switch": (config(attention_bias=1), "attention_bias must be true or false, not 1"),
    "a list for a number": (config(rms_norm_eps=[1]), "rms_norm_eps must be a number"),
    "not a number": (config(max_position_embeddings=float("nan")), "wrong kind"),
    "no positions": (config(max_position_embeddings=0), "max_position must be at least 1"),
    "architecture in a list": (config(architectures=[["x"]]), "architecture .* is not supported"),
    "config not text": (text("config.json", b"\xff\xfe"), r"config\.json is not valid JSON"),
    "config too deep": (text("config.json", "[" * 100_000), r"config\.json is not valid JSON"),
    "generation config": (text("generation_config.json", "[1]"), r"generation_config\.json must hold a JSON object"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "SentencePiece only": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
        r"tokenizer\.json is missing \(tokenizer\.model alone is not enough\).*save_pretrained",
    ),
    "tokenizer cut": (text("tokenizer.json", '{"version'), "the tokenizer cannot be read"),
    "tokenizer not text": (text("tokenizer.json", b"\xff\xfe\x00"), r"tokenizer\.json cannot be read"),
    "tokenizer of nothing": (text("tokenizer.json", "[]"), "it holds no model"),
    "more tokens than rows": (config(vocab_size=300), r"token ids up to 319, the model's vocab_size is 300"),
    "tokenizer settings": (text("tokenizer_config.json", "{"), r"tokenizer_config\.json is not valid JSON"),
    "template": (text("chat_template.jinja", "{% if %}"), "chat template is not valid Jinja"),
    "template not text": (text("chat_template.jinja", b"\xff\xfe"), r"chat_template\.jinja cannot be read"),
}  # fmt: skip


def load(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    Tokenizer.open(checkpoint)
    load_weights(Decoder(checkpoint.config, KERNELS, dtype=torch.float32, device="cpu"), checkpoint)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_before_any_weight_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a weight was read")

    damage, says = BROKEN[name]
    damage(write_tiny_llama(tmp_path))
    monkeypatch.setattr(_SafetensorsSource, "copy", never)
    with pytest.raises(UnsupportedCheckpoint, match=f"(?s){says}") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(str(write_tiny_llama(tmp_path)))
    enter = _SafetensorsSource.__enter__

    def shrink(source: _SafetensorsSource) -> _SafetensorsSource:
        with (tmp_path / WEIGHTS).open("r+b") as file:
            file.truncate(5000)
        return enter(source)

    monkeypatch.setattr(_SafetensorsSource, "__enter__", shrink)
    with pytest.raises(UnsupportedCheckpoint, match="ended while it was read"):
        load_weights(Decoder(checkpoint.config, KERNELS, dtype=torch.float32, device="cpu"), checkpoint)
