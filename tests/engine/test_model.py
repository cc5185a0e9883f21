"""The decoder computes what transformers computes, for every flag a Llama can carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.rope import inverse_frequencies
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from tests.support.rollout import page_order, plan_for, sequence
from tests.support.tiny import write_tiny_llama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"num_heads": 4, "num_kv_heads": 4},
    "gqa_tied": {"num_heads": 8, "num_kv_heads": 2, "tied": True},
    "mqa_biases": {"num_heads": 4, "num_kv_heads": 1, "attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_parameters": LLAMA3},
    "linear_rope": {"rope_parameters": LINEAR},
    "wide_heads": {"head_dim": 40, "num_layers": 3},
}


def all_logits(runner: ModelRunner, prompt: list[int], chunk: int) -> Tensor:
    """Logits after every `chunk` tokens, `[steps, vocab]`: what a run in chunks sees at its chunk ends."""
    free, pages, found, computed = page_order(runner), [], [], 0
    while computed < len(prompt):
        # cut to this chunk's end, so that its last token is one that samples
        item = sequence(prompt[: computed + chunk], SamplingParams(temperature=0.0, seed=0))
        item.num_computed, item.pages = computed, pages
        found.append(runner.logits(plan_for(runner, [item], free, chunk)))
        computed += chunk
    return torch.cat(found).float()


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(tmp_path: Path, name: str, kernels: Any) -> None:
    write_tiny_llama(tmp_path, **MODELS[name])
    config = EngineConfig(model=str(tmp_path), kernels=kernels, max_num_seqs=2)
    runner = ModelRunner.load(config, Checkpoint.open(str(tmp_path)))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    prompt = torch.randint(3, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    for chunk in (1, 30):
        found = all_logits(runner, prompt, chunk)
        torch.testing.assert_close(found, expected[chunk - 1 :: chunk], rtol=1e-3, atol=2e-4)


def test_bf16_logits_stay_near_fp32(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, dtype="bfloat16")
    prompt = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    found = {}
    for dtype in ("bfloat16", "float32"):
        config = EngineConfig(model=str(tmp_path), dtype=dtype, max_num_seqs=2)  # type: ignore[arg-type]
        found[dtype] = all_logits(ModelRunner.load(config, Checkpoint.open(str(tmp_path))), prompt, 20)
    spread = found["float32"].std()
    assert (found["bfloat16"] - found["float32"]).abs().mean() < 0.03 * spread


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e5}, LINEAR, LLAMA3])
def test_frequencies_equal_those_of_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    write_tiny_llama(tmp_path, rope_parameters=rope, head_dim=64)
    ours = inverse_frequencies(Checkpoint.open(str(tmp_path)).config, 512)
    config = LlamaConfig.from_pretrained(tmp_path)
    if rope["rope_type"] == "default":
        theirs = 1.0 / rope["rope_theta"] ** (torch.arange(0, 64, 2).float() / 64)
    else:
        theirs, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
