"""Loading is strict: every tensor is used, every parameter filled, and errors name the tensor."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.load_progress import LoadProgress
from engine.model import Decoder
from engine.weights import load_weights
from kernels.reference import KERNELS
from tests.support.tiny import write_tiny_llama


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    checkpoint = Checkpoint.open(str(folder))
    decoder = Decoder(checkpoint.config, KERNELS, dtype=dtype, device="cpu")
    for parameter in decoder.parameters.values():
        parameter.fill_(float("nan"))
    load_weights(decoder, checkpoint)
    return decoder


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("num_shards", [1, 3])
def test_merged_and_plain_tensors_hold_the_stored_values(tmp_path: Path, num_shards: int) -> None:
    write_tiny_llama(tmp_path, attention_bias=True, mlp_bias=True, num_shards=num_shards)
    stored: dict[str, Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    found = loaded(tmp_path).parameters
    layer = "model.layers.1"
    for kind in ("weight", "bias"):
        qkv = [stored[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(found[f"{layer}.self_attn.qkv_proj.{kind}"], torch.cat(qkv))
        gate_up = [stored[f"{layer}.mlp.{part}_proj.{kind}"] for part in ("gate", "up")]
        assert torch.equal(found[f"{layer}.mlp.gate_up_proj.{kind}"], torch.cat(gate_up))
    for name in ("model.embed_tokens.weight", "lm_head.weight", f"{layer}.mlp.down_proj.bias"):
        assert torch.equal(found[name], stored[name])
    assert not any(torch.isnan(parameter).any() for parameter in found.values())


def test_values_are_converted_to_the_wanted_dtype(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, dtype="float16")
    found = loaded(tmp_path, torch.bfloat16).parameters["model.norm.weight"]
    assert torch.equal(found, load_file(tmp_path / "model.safetensors")["model.norm.weight"].bfloat16())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__k_proj__weight=None)
    with pytest.raises(UnsupportedCheckpoint, match=r"layers\.0\.self_attn\.k_proj\.weight is missing"):
        loaded(tmp_path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__q_norm__weight=torch.ones(16))
    with pytest.raises(UnsupportedCheckpoint, match=r"q_norm\.weight is not known"):
        loaded(tmp_path)


def test_biases_the_config_does_not_speak_of_are_not_dropped(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__q_proj__bias=torch.ones(64))
    with pytest.raises(UnsupportedCheckpoint, match=r"q_proj\.bias is not known"):
        loaded(tmp_path)


def test_where_merged_tensors_are_expected_single_ones_are_not_known(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path) / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "Phi3ForCausalLM"))
    with pytest.raises(UnsupportedCheckpoint, match=r"(gate|up|q|k|v)_proj\.weight is not known"):
        loaded(tmp_path)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, model__norm__weight=torch.ones(63))
    with pytest.raises(UnsupportedCheckpoint, match=r"model\.norm\.weight has shape \(63,\), not \(64,\)"):
        loaded(tmp_path)


def test_leftovers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    loaded(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_may_be_stored_again_but_must_be_the_embedding(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.weight_source._SafetensorsSource.piece_bytes", 1000)
    write_tiny_llama(tmp_path, tied=True, nan_token_id=7)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, lm_head__weight=embedding.clone())
    assert "lm_head.weight" not in loaded(tmp_path, dtype).parameters
    embedding[319, 63] += 1
    rewrite(tmp_path, lm_head__weight=embedding)
    with pytest.raises(
        UnsupportedCheckpoint, match=r"lm_head\.weight differs from the embedding, though tie_word"
    ):
        loaded(tmp_path, dtype)
    rewrite(tmp_path, lm_head__weight=embedding[1:].clone())
    with pytest.raises(
        UnsupportedCheckpoint, match=r"lm_head\.weight has shape \(319, 64\), not \(320, 64\)"
    ):
        loaded(tmp_path, dtype)


def test_pieces_of_any_size_and_merged_ones_land_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_llama(tmp_path, attention_bias=True, num_shards=2, dtype="bfloat16")
    for dtype in (torch.bfloat16, torch.float32):
        whole = loaded(tmp_path, dtype).parameters
        with monkeypatch.context() as patch:
            patch.setattr("engine.weight_source._SafetensorsSource.piece_bytes", 1000)  # 7 rows, and a rest
            in_pieces = loaded(tmp_path, dtype).parameters
        for name, parameter in whole.items():
            assert torch.equal(parameter, in_pieces[name]), name
            assert not torch.isnan(parameter).any()


def test_without_a_terminal_two_lines_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint.open(str(write_tiny_llama(tmp_path)))
    decoder = Decoder(checkpoint.config, KERNELS, dtype=torch.float32, device="cpu")
    with caplog.at_level("INFO", "engine.load_progress"):
        load_weights(decoder, checkpoint, bar=True)
    first, last = caplog.messages
    assert re.fullmatch(rf"loading {re.escape(str(tmp_path))}, 0 MB", first)
    assert re.fullmatch(r"loaded 0 MB in \d+\.\d s, \d+ MB/s", last)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bar", [True, False])
def test_at_a_terminal_there_is_a_bar_if_one_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bar: bool
) -> None:
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    try:
        with os.fdopen(writer, "w") as terminal, caplog.at_level("INFO", "engine.load_progress"):
            monkeypatch.setattr(sys, "stderr", terminal)
            with LoadProgress(tmp_path, 5_000_000, bar=bar) as progress:
                progress.advance(5_000_000)
            os.set_blocking(reader, False)
            shown = ""
            with contextlib.suppress(BlockingIOError):
                while True:
                    shown += os.read(reader, 10_000).decode()
    finally:
        os.close(reader)
    assert bool(shown) == bar
    assert not bar or ("Loading: 100%" in shown and "5.00M/5.00M" in shown)
    assert bool(caplog.messages) != bar


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnsupportedCheckpoint, match="not readable"):
        loaded(tmp_path)
