"""A config.json that was edited, or that says a thing twice, is read as transformers reads it: the logprobs of a
prompt are those of the model that `AutoModelForCausalLM` makes of the same folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import config_json, foreign
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model_config import UnsupportedCheckpoint
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from tests.support.families import write_tiny
from tests.support.pressure import run
from tests.support.tiny import SIZES, VOCAB_SIZE

SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OSS = {
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
EDITED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # the model, and what is then written over
    "YaRN beside rope_parameters": ("Qwen2", {}, {"rope_scaling": YARN}),
    "YaRN by its old name": ("Qwen2", {}, {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "other than rope_parameters": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_scaling": {**YARN, "rope_theta": 900.0}},
    ),
    "over those of a kind of layer": (
        "Gemma3",
        {"head_dim": 16, "layer_types": [FULL, SLIDING]},
        {"rope_scaling": {"rope_type": "linear", "factor": 16.0}},
    ),
    "YaRN's original length beside it": (
        "Llama",
        {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
        {"original_max_position_embeddings": 8},
    ),
    "Llama 3's original length beside it": (
        "Llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 10000.0}},
        {"original_max_position_embeddings": 16},
    ),
    "no original length": ("Llama", {}, {"rope_scaling": LLAMA3}),
    "an original length that Gemma 3 does not hear": (
        "Gemma3",
        {"head_dim": 16, "layer_types": [FULL, SLIDING]},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
    ),
    "an activation that Gemma 2 does not hear": (
        "Gemma2",
        {"head_dim": 16, "hidden_activation": "relu"},
        {"hidden_activation": None, "hidden_act": "relu"},
    ),
    "an activation that GPT-2 does not hear": (
        "GPT2LMHeadModel",
        {"activation_function": "relu"},
        {"activation_function": None, "hidden_act": "relu"},
    ),
    "an MLP as Falcon does not hear of it": (
        "Falcon",
        {"activation": "relu"},
        {"activation": None, "hidden_act": "relu", "intermediate_size": 7, "rms_norm_eps": 1.0},
    ),
    "rotation as GPT-NeoX does not hear of it": (
        "GPTNeoX",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": None, "rope_theta": 7.0, "partial_rotary_factor": 1.0, "rms_norm_eps": 1.0},
    ),
    "what gpt-oss fills in, and what it does not hear": (
        "GptOss",
        OSS,
        {
            "rope_parameters": None,
            "layer_types": None,
            "sliding_window": 9,
            "hidden_act": "relu",
            "mlp_bias": False,
            "attention_out_bias": False,
        },
    ),
    "gpt-oss's rope as it was published": (
        "GptOss",
        OSS,
        {"rope_parameters": None, "rope_theta": 500, "rope_scaling": {**YARN, "truncate": False}},
    ),
    "gpt-oss's rope as an empty field": ("GptOss", OSS, {"rope_parameters": {}}),
    "more experts for a token": ("GptOss", OSS, {"num_experts_per_tok": 3, "experts_per_token": 1}),
    "Mistral with layer_types": ("Mistral", {"sliding_window": 9}, {"layer_types": [FULL, SLIDING]}),
}
PROMPT = tuple(random.Random(5).choices(range(3, VOCAB_SIZE), k=70))


def edit(folder: Path, fields: dict[str, Any]) -> None:
    """`None` takes a field away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def ours(folder: Path) -> list[float]:
    engine = Engine.load(
        EngineConfig(model=str(folder), dtype="float32", device="cpu", threads=1, max_num_batched_tokens=16)
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, seed=1, prompt_logprobs=0)
    request = Request(id=RequestId("one", 1), prompt_token_ids=PROMPT, sampling=sampling)
    scored = run(engine, [request], poison=False)[request.id].prompt_logprobs
    assert scored is not None
    return [one.logprob for one in scored if one is not None]


def theirs(folder: Path) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    token_ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        logprobs = model(token_ids).logits[0, :-1].log_softmax(dim=-1)
    return list(logprobs.gather(1, token_ids[0, 1:, None])[:, 0].tolist())


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_config_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    family, changes, fields = EDITED[name]
    write_tiny(tmp_path, family if family.endswith("Model") else f"{family}ForCausalLM", changes)
    before = ours(tmp_path)
    edit(tmp_path, fields)
    after = ours(tmp_path)
    assert after == pytest.approx(theirs(tmp_path), abs=1e-4)
    assert after != pytest.approx(before, abs=1e-2)  # the edit tells


LOST = [
    ({"rope_theta": 5e5, "rope_type": "default"}, {}, r"whose rope_theta \(500000.0\) it lacks"),
    ({"partial_rotary_factor": 0.5}, {}, r"whose partial_rotary_factor \(0.5\) it lacks"),
    ({}, {"full_attention": YARN}, "rope_scaling by kind of layer is not supported"),
]


@pytest.mark.parametrize(("parameters", "scaling", "says"), LOST)
@pytest.mark.parametrize("read", [config_json.model_config, foreign.model_config])
def test_what_rope_scaling_would_lose_is_named(
    read: Callable[[dict[str, Any]], Any], parameters: dict[str, Any], scaling: dict[str, Any], says: str
) -> None:
    config = {**SIZES, "architectures": ["LlamaForCausalLM"], "rope_parameters": parameters}
    with pytest.raises(UnsupportedCheckpoint, match=says):
        read({**config, "rope_scaling": {**YARN, **scaling}})


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_a_rope_that_follows_lengths_is_refused_wherever_it_stands(place: str) -> None:
    config = {**SIZES, "architectures": ["CohereForCausalLM"], "rope_scaling": YARN, "rope_parameters": YARN}
    foreign.model_config(config)
    with pytest.raises(UnsupportedCheckpoint, match="rope_type 'dynamic' is not supported"):
        foreign.model_config({**config, place: {"rope_type": "dynamic", "factor": 2.0}})
