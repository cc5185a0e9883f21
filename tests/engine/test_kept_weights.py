"""Weights that stay quantised: what is kept, bit for bit, and answers as those of the same weights made plain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model import Decoder
from engine.quantised_linear import QuantisedLinear
from engine.request import Request, RequestId
from engine.runner import ModelRunner, load_decoder
from engine.sampling_params import SamplingParams
from kernels import Kernels, kernels_for
from kernels.reference import KERNELS
from kernels.weights import Float8Weight, Int4Weight
from tests.support.families import write_tiny
from tests.support.quantised import Quantiser, awq, float8, gptq, write
from tests.support.tiny import write_tiny_llama

AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
OF_CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": OF_CHANNELS}},
}
CASES: dict[str, tuple[Quantiser, dict[str, Any]]] = {
    "awq": (awq(32), AWQ | {"group_size": 32}),
    "awq of one group": (awq(-1), AWQ | {"group_size": -1}),
    "gptq": (gptq(64), GPTQ | {"group_size": 64}),
    "gptq asymmetric": (gptq(128, symmetric=False), GPTQ | {"group_size": 128, "sym": False}),
    "gptq act-order": (gptq(32, act_order=True), GPTQ | {"group_size": 32, "desc_act": True}),
    "fp8 blocks": (float8(128, 128, "weight_scale_inv"), FP8 | {"weight_block_size": [128, 128]}),
    "fp8 whole": (float8(None, None, "weight_scale", dims=0), FP8),
    "channels": (float8(1, None, "weight_scale", dtype=torch.bfloat16), CHANNELS),
}
NOT_KEPT: dict[str, tuple[Quantiser, dict[str, Any]]] = {
    "gptq of 8 bits": (gptq(32, bits=8), GPTQ | {"group_size": 32, "bits": 8}),
    "gptq, scales of 32 bits": (gptq(32, scale=np.float32), GPTQ | {"group_size": 32}),
    "awq, groups of 8": (awq(8), AWQ | {"group_size": 8}),
    "fp8, smaller blocks": (float8(64, 64, "weight_scale_inv"), FP8 | {"weight_block_size": [64, 64]}),
}
# the reference set, as if it were quick
KEEPING = dataclasses.replace(KERNELS, keeps=(Int4Weight, Float8Weight))


def tiny(folder: Path, **more: Any) -> Path:
    """Of one layer, whose inputs fill words."""
    return write_tiny_llama(folder, num_layers=1, hidden_size=128, intermediate_size=256, num_heads=4, **more)


def loaded(folder: Path, kernels: Kernels = KEEPING, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = load_decoder(Checkpoint.open(str(folder)), kernels, dtype=dtype, device="cpu")
    assert isinstance(decoder, Decoder)
    return decoder


def assert_same(quantised: Path, plain: Path, kept: set[str]) -> None:
    """Exactly `kept` parameters stay quantised, and all stand for the plain ones."""
    found, wanted = loaded(quantised), loaded(plain, KERNELS)
    assert set(found.quantised) == kept
    for name, parameter in wanted.parameters.items():
        if name in kept:
            assert found.parameters[name].is_meta
            assert torch.equal(found.quantised[name].dequantised(), parameter), name
        else:
            assert torch.equal(found.parameters[name], parameter), name


def products(decoder: Decoder) -> set[str]:
    return {name for name, value in decoder.parameters.items() if value.dim() == 2 and ".layers." in name}


def multiple_of_blocks(name: str) -> dict[str, Any]:
    """With blocks of 128 all parts of qkv_proj must be multiples of 128 outputs."""
    return {"head_dim": 128, "num_kv_heads": 1} if name == "fp8 blocks" else {}


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_means_the_weights_of_its_formula(tmp_path: Path, name: str) -> None:
    quantised, plain = write(tiny(tmp_path / "model", **multiple_of_blocks(name)), *CASES[name])
    assert_same(quantised, plain, products(loaded(plain, KERNELS)))


@pytest.mark.parametrize("name", NOT_KEPT)
def test_what_does_not_fit_is_made_plain(tmp_path: Path, name: str) -> None:
    assert_same(*write(tiny(tmp_path / "model"), *NOT_KEPT[name]), set())


def test_inputs_that_fill_no_words_are_made_plain(tmp_path: Path) -> None:
    assert_same(*write(write_tiny_llama(tmp_path / "model"), *CASES["awq"]), set())


def test_merged_parts_of_which_one_is_plain_are_made_plain(tmp_path: Path) -> None:
    keep = ("lm_head", "k_proj", "o_proj")
    config = CASES["awq"][1] | {"modules_to_not_convert": list(keep)}
    quantised, plain = write(tiny(tmp_path / "model"), awq(32), config, keep=keep)
    mlp = "model.layers.0.mlp"
    assert_same(quantised, plain, {f"{mlp}.gate_up_proj.weight", f"{mlp}.down_proj.weight"})


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "GPTNeoXForCausalLM"])
def test_parts_that_are_stored_merged(tmp_path: Path, architecture: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    write_tiny(tmp_path / "model", architecture, sizes)
    quantised, plain = write(tmp_path / "model", *CASES["gptq act-order"])
    everything = products(loaded(plain, KERNELS))
    grouped = {name for name in everything if "qkv_proj" in name and architecture.startswith("GPT")}
    assert_same(quantised, plain, everything - grouped)


def test_a_set_that_keeps_nothing_makes_all_plain(tmp_path: Path) -> None:
    quantised, _ = write(tiny(tmp_path / "model"), *CASES["awq"])
    assert not loaded(quantised, KERNELS).quantised
    assert not kernels_for("cpu", "cpu").keeps


def test_kept_weights_take_a_quarter_of_the_memory(tmp_path: Path) -> None:
    quantised, _ = write(tiny(tmp_path / "model"), *CASES["gptq asymmetric"])
    decoder = loaded(quantised, dtype=torch.bfloat16)
    for name, weight in decoder.quantised.items():
        plain = decoder.parameters[name].numel() * 2
        assert weight.num_bytes == plain * (64 + 4) // 256
    assert decoder.scratch_bytes == 2 * 256 * 2 * 128


def answers(folder: Path, kernels: Kernels, *, deterministic: bool = False) -> list[tuple[int, ...]]:
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", page_size=16, max_model_len=64, max_num_seqs=3,
        kv_cache_memory_bytes=2**22, deterministic=deterministic, threads=1,
    )  # fmt: skip
    runner = ModelRunner.over(loaded(folder, kernels), config)
    engine = Engine(runner, None, config)
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=6, ignore_eos=True)
    for number, prompt in enumerate(((5, 9, 40), tuple(range(20, 37)))):
        engine.add(Request(id=RequestId(str(number), 1), prompt_token_ids=prompt, sampling=sampling))
    done = {}
    while engine.has_work:
        done |= {one.id.job_id: one.outputs[0].token_ids for one in engine.step()}
    return [done[name] for name in sorted(done)]


@pytest.mark.parametrize(
    ("name", "bias"),
    [("awq", True), pytest.param("gptq act-order", False, marks=pytest.mark.interpreted)],
)
def test_the_tokens_are_those_of_the_weights_made_plain(tmp_path: Path, name: str, bias: bool) -> None:
    quantised, plain = write(tiny(tmp_path / "model", attention_bias=bias), *CASES[name])
    triton = kernels_for("cpu", "triton")
    assert Int4Weight in triton.keeps
    expected = answers(plain, KERNELS)
    assert answers(quantised, triton) == expected
    assert len(set(expected[0])) > 2


@pytest.mark.parametrize("name", ["fp8 whole", pytest.param("fp8 blocks", marks=pytest.mark.interpreted)])
def test_activations_of_8_bits_are_rounded_alike_by_all_sets(tmp_path: Path, name: str) -> None:
    quantised, _ = write(tiny(tmp_path / "model", **multiple_of_blocks(name)), *CASES[name])
    assert answers(quantised, kernels_for("cpu", "triton")) == answers(quantised, KEEPING)


@pytest.mark.parametrize("name", ["fp8 blocks", "channels"])
def test_activations_of_8_bits_change_a_product_little(tmp_path: Path, name: str) -> None:
    quantised, plain = write(tiny(tmp_path / "model", **multiple_of_blocks(name)), *CASES[name])
    found, wanted = loaded(quantised), loaded(plain, KERNELS)
    for decoder in (found, wanted):
        decoder.prepare(64)
    for ours, theirs in zip(found._products(), wanted._products(), strict=True):
        x = torch.randn(7, theirs.num_inputs)
        exact = theirs(x)
        assert (ours(x) - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


@pytest.mark.interpreted
def test_the_tokens_in_deterministic_mode(tmp_path: Path) -> None:
    quantised, plain = write(tiny(tmp_path / "model"), *CASES["gptq"])
    assert answers(quantised, kernels_for("cpu", "triton"), deterministic=True) == answers(plain, KERNELS)


def test_a_merged_product_is_one_with_its_bias(tmp_path: Path) -> None:
    quantised, plain = write(tiny(tmp_path / "model", attention_bias=True), *CASES["awq"])
    found, wanted = loaded(quantised), loaded(plain, KERNELS)
    for decoder in (found, wanted):
        decoder.prepare(64)
    x = torch.randn(5, 128)
    assert not found.quantised
    for ours, theirs in zip(found._products(), wanted._products(), strict=True):
        assert ours.shape == theirs.shape
        if isinstance(ours, QuantisedLinear) and ours.num_inputs == 128:
            torch.testing.assert_close(ours(x), theirs(x))
    assert sum(isinstance(product, QuantisedLinear) for product in found._products()) == 4
