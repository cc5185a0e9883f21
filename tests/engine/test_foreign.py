"""config.json of what transformers computes becomes a ModelConfig without torch, or is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Checkpoint
from engine.foreign import model_config
from engine.model_config import UnsupportedCheckpoint
from tests.support.tiny import write_tiny_llama
from tests.support.tree import ROOT

PHI: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "vocab_size": 51200,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "torch_dtype": "float16",
    "eos_token_id": 50256,
}
BIGCODE: dict[str, Any] = {
    "architectures": ["GPTBigCodeForCausalLM"],
    "vocab_size": 49280,
    "n_embd": 2048,
    "n_layer": 24,
    "n_head": 16,
    "n_positions": 8192,
    "multi_query": True,
}


def test_sizes_under_the_usual_names() -> None:
    config = model_config(PHI, {"eos_token_id": [7, 9]})
    assert (config.definition, config.dtype, config.eos_token_ids) == ("transformers", "float16", (7, 9))
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (32, 32, 32, 80)
    assert (config.vocab_size, config.max_position) == (51200, 2048)


def test_sizes_under_the_names_of_gpt2() -> None:
    config = model_config(BIGCODE)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (24, 16, 1, 128)
    assert (config.hidden_size, config.max_position) == (2048, 8192)
    assert model_config({**BIGCODE, "multi_query": False}).num_kv_heads == 16


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"architectures": ["FancyModel"]}, "FancyModel"),
        ({"architectures": None}, "architecture"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"text_config": {"hidden_size": 8}}, "text_config"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": "many"}, "wrong kind"),
        ({"rope_scaling": ["linear"]}, "wrong kind"),
        ({"torch_dtype": "float64"}, "float64"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=named):
        model_config({**PHI, **fields})


def test_the_setting_decides_whose_code_it_is(tmp_path: Path) -> None:
    folder = str(write_tiny_llama(tmp_path))
    assert Checkpoint.open(folder).config.definition == "nightpress"
    assert Checkpoint.open(folder, model_impl="nightpress").config.definition == "nightpress"
    assert Checkpoint.open(folder, model_impl="transformers").config.definition == "transformers"


def test_what_is_not_ours_can_be_refused(tmp_path: Path) -> None:
    config = json.loads((write_tiny_llama(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["PhiForCausalLM"]}))
    assert Checkpoint.open(str(tmp_path)).config.definition == "transformers"
    with pytest.raises(UnsupportedCheckpoint, match="PhiForCausalLM"):
        Checkpoint.open(str(tmp_path), model_impl="nightpress")


def test_gguf_is_not_for_transformers(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(UnsupportedCheckpoint, match="model_impl"):
            Checkpoint.open(str(path), model_impl="transformers")


def test_nothing_of_it_loads_torch(tmp_path: Path) -> None:
    config = json.loads((write_tiny_llama(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["PhiForCausalLM"]}))
    code = (
        "import sys; from engine.checkpoint import Checkpoint;"
        "assert Checkpoint.open(sys.argv[1]).config.definition == 'transformers';"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
