"""Quantised checkpoints hold, bit for bit, the weights that their formats' formulas give, and answer as those do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, SamplingParams
from tests.support.families import write_tiny
from tests.support.loaded import parameters
from tests.support.quantised import WEIGHTS, Quantiser, awq, float8, gptq, write
from tests.support.tiny import write_tiny_llama

AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["lm_head"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "damp_percent": 0.01}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BLOCKS = FP8 | {
    "weight_block_size": [40, 48],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}
ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    told = {
        "num_bits": 8,
        "type": "float",
        "strategy": strategy,
        "dynamic": False,
        "symmetric": True,
        **weights,
    }
    group = {
        "targets": ["Linear"],
        "weights": told,
        "input_activations": ACTIVATIONS,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    }


# 64 or 96 inputs: groups of 32 are two or three, of 64 one, or one and a half
CASES: dict[str, tuple[Quantiser, dict[str, Any]]] = {
    "awq": (awq(32), AWQ | {"group_size": 32}),
    "awq of one group": (awq(-1), AWQ | {"group_size": -1}),
    "awq in older words": (
        awq(16),
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "version": "GEMM"},
    ),
    "gptq": (gptq(32), GPTQ | {"group_size": 32}),
    "gptq asymmetric": (gptq(16, symmetric=False), GPTQ | {"group_size": 16, "sym": False}),
    "gptq act-order": (gptq(32, act_order=True), GPTQ | {"group_size": 32, "desc_act": True}),
    "gptq act-order, a short group": (
        gptq(64, act_order=True, symmetric=False),
        GPTQ | {"group_size": 64, "desc_act": True, "sym": False},
    ),
    "gptq of one group": (gptq(-1), GPTQ | {"group_size": -1}),
    "gptq of 8 bits": (gptq(32, bits=8), GPTQ | {"group_size": 32, "bits": 8}),
    "gptq, scales of 32 bits": (
        gptq(32, bits=8, symmetric=False, scale=np.float32),
        GPTQ | {"group_size": 32, "bits": 8, "sym": False},
    ),
    "gptq of 8 bits, act-order, asymmetric": (
        gptq(32, bits=8, symmetric=False, act_order=True),
        GPTQ | {"group_size": 32, "bits": 8, "desc_act": True, "sym": False},
    ),
    "gptq v2": (
        gptq(32, symmetric=False, version=2),
        GPTQ | {"group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
    ),
    "fp8 blocks": (float8(40, 48, "weight_scale_inv"), BLOCKS),
    "fp8 blocks, bf16 scales": (float8(40, 48, "weight_scale_inv", dtype=torch.bfloat16), BLOCKS),
    "fp8 whole": (float8(None, None, "weight_scale", dims=0), FP8 | {"ignored_layers": ["lm_head"]}),
    "channels": (float8(1, None, "weight_scale", dtype=torch.bfloat16), compressed("channel")),
    "tensor": (float8(None, None, "weight_scale", dims=1), compressed("tensor")),
    "blocks": (float8(32, 32, "weight_scale"), compressed("block", block_structure=[32, 32])),
}


def same(one: Path, other: Path, dtype: torch.dtype = torch.float32) -> None:
    left, right = parameters(one, dtype), parameters(other, dtype)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def answers(folder: Path) -> list[tuple[int, ...]]:
    llm = LLM(str(folder), kv_cache_memory_bytes=1 << 22, max_num_seqs=4, threads=1)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = ["the quick brown fox", "a", "prints every page by morning"]
    return [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("name", CASES)
def test_every_format_gives_the_weights_of_its_formula(tmp_path: Path, name: str) -> None:
    quantised, plain = write(write_tiny_llama(tmp_path / "model"), *CASES[name])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        same(quantised, plain, dtype)


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "fp8 blocks", "channels"])
def test_tokens_are_those_of_the_same_weights_stored_plainly(tmp_path: Path, name: str) -> None:
    quantised, plain = write(write_tiny_llama(tmp_path / "model"), *CASES[name])
    found = answers(quantised)
    assert found == answers(plain)
    assert len(set(found[0])) > 2


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Qwen3ForCausalLM", {"head_dim": 24}),
        (
            "Qwen3MoeForCausalLM",
            {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
        ),
        ("MixtralForCausalLM", {"num_local_experts": 2}),
        ("Phi3ForCausalLM", {}),
        ("GPTNeoXForCausalLM", {}),
    ],
)
@pytest.mark.parametrize("name", ["gptq asymmetric", "fp8 blocks", "channels"])
def test_names_and_layouts_of_families(
    tmp_path: Path, name: str, architecture: str, changes: dict[str, Any]
) -> None:
    write_tiny(tmp_path / "model", architecture, changes)
    same(*write(tmp_path / "model", *CASES[name]))


@pytest.mark.parametrize("name", ["awq", "gptq act-order", "fp8 blocks"])
def test_matrices_of_many_pieces(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.stored_tensors.WEIGHTS_AT_ONCE", 1000)
    monkeypatch.setattr("engine.quantised_source.QuantisedSource.piece_bytes", 700)
    same(*write(write_tiny_llama(tmp_path / "model"), *CASES[name]))


def test_parts_of_a_module_in_several_files(tmp_path: Path) -> None:
    quantised, plain = write(write_tiny_llama(tmp_path / "model"), *CASES["gptq act-order"])
    tensors = load_file(quantised / WEIGHTS)
    (quantised / WEIGHTS).unlink()
    shards = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, quantised / shard, {"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (quantised / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    same(quantised, plain)


def test_a_part_of_the_modules_may_be_plain(tmp_path: Path) -> None:
    keep = ("lm_head", "layers.0.", "down_proj")
    config = AWQ | {
        "group_size": 32,
        "modules_to_not_convert": ["lm_head", "model.layers.0", "mlp.down_proj"],
    }
    same(*write(write_tiny_llama(tmp_path / "model"), awq(32), config, keep=keep))


def test_biases_are_read_and_those_of_zeros_for_which_there_is_no_place_are_not(tmp_path: Path) -> None:
    quantised, plain = write(write_tiny_llama(tmp_path / "model", attention_bias=True), *CASES["gptq"])
    tensors = load_file(quantised / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(96, dtype=torch.float16)
    save_file(tensors, quantised / WEIGHTS, {"format": "pt"})
    same(quantised, plain)


def test_what_is_said_about_activations_is_left_aside(tmp_path: Path) -> None:
    quantised, plain = write(write_tiny_llama(tmp_path / "model"), *CASES["tensor"])
    tensors = load_file(quantised / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.tensor([0.02])
    save_file(tensors, quantised / WEIGHTS, {"format": "pt"})
    same(quantised, plain)


def test_groups_of_zeros_stand_for_groups_in_order_where_no_order_is_told(tmp_path: Path) -> None:
    quantised, plain = write(write_tiny_llama(tmp_path / "model"), *CASES["gptq"])
    tensors = load_file(quantised / WEIGHTS)
    for name in tensors:
        if name.endswith(".g_idx"):
            tensors[name].zero_()
    save_file(tensors, quantised / WEIGHTS, {"format": "pt"})
    same(quantised, plain)
