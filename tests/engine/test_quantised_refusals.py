"""What a quantised checkpoint asks for and cannot have is refused by field or tensor, nearly all of it before any
weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.model import Decoder
from engine.quantisation import is_plain, read_quantisation
from engine.weight_source import _SafetensorsSource
from engine.weights import load_weights
from kernels.reference import KERNELS
from tests.support.families import write_tiny
from tests.support.quantised import WEIGHTS, float8, gptq, write
from tests.support.tiny import write_tiny_llama

Tensors = dict[str, Tensor]
AWQ: Mapping[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
}
GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
FP8: Mapping[str, Any] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
GROUP: Mapping[str, Any] = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
COMPRESSED: Mapping[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"g": GROUP},
}


def group(**weights: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"g": {"weights": {**GROUP["weights"], **weights}}}}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("bitsandbytes", "quant_method 'bitsandbytes' is not supported; allowed: awq, gptq, fp8, compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes' is not supported"),
        ({"quant_method": "hqq"}, "quant_method 'hqq'"),
        ({"bits": 4}, "quant_method None"),
        ({"quant_method": ["awq"]}, "quant_method .* is not supported"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' is not supported; allowed: gemm"),
        ({**AWQ, "bits": 8}, "bits 8 is not supported; allowed: 4"),
        ({**AWQ, "zero_point": False}, "zero_point False is not supported; allowed: True"),
        ({**AWQ, "group_size": 0}, "group_size must be at least 1, or -1 for all inputs, not 0"),
        ({**AWQ, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of names"),
        ({**GPTQ, "bits": 3}, "bits 3 is not supported; allowed: 4, 8"),
        ({**GPTQ, "bits": 2}, "bits 2 is not supported; allowed: 4, 8"),
        ({**GPTQ, "bits": True}, "bits True is not supported"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'.*allowed: gptq, gptq_v2"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format True is not supported; allowed: False"),
        ({**GPTQ, "dynamic": {"+:x": {"bits": 8}}}, "dynamic .*is not supported"),
        ({"quant_method": "gptq", "bits": 4}, "group_size must be"),
        ({"quant_method": "gptq"}, "bits is missing"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2' is not supported; allowed: e4m3"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size must be two whole numbers"),
        ({**FP8, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .*allowed: none"),
        ({**FP8, "expert_dtype": "fp4"}, "expert_dtype 'fp4' is not supported; allowed: fp8"),
        ({**COMPRESSED, "format": "pack-quantized"}, "format 'pack-quantized'.*allowed: float-quantized"),
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({**COMPRESSED, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .*allowed: none"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**COMPRESSED, "transform_config": {"config_groups": {}}}, "transform_config"),
        ({**COMPRESSED, "quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups must name"),
        ({**COMPRESSED, "config_groups": {"g": {"weights": None}}}, r"config_groups\.g\.weights is missing"),
        ({**COMPRESSED, "ignore": ["re:("]}, "ignore: 're:\\(' is no regular expression"),
        (group(type="int"), "type 'int' is not supported; allowed: float"),
        (group(num_bits=4), "num_bits 4"),
        (group(symmetric=False), "symmetric False"),
        (group(strategy="group"), "strategy 'group' .*allowed: channel, tensor, block"),
        (group(strategy="block"), "block_structure must be"),
    ],
)  # fmt: skip
def test_fields_are_named_with_what_is_allowed(given: Any, says: str) -> None:
    with pytest.raises(
        UnsupportedCheckpoint, match=rf"quantization_config \(.*\): .*{says}.*original weights"
    ):
        read_quantisation({"quantization_config": given})


def test_modules_that_are_not_quantised_are_named_by_whole_parts() -> None:
    names = ("lm_head", "model.layers.0", "mlp.gate", "re:.*o_proj$")
    assert all(
        is_plain(module, names)
        for module in ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate", "a.o_proj")
    )
    assert not any(
        is_plain(module, names)
        for module in ("model.layers.01.mlp", "model.layers.1.mlp.gate_proj", "x.lm_head.y", "a.o_proj.b")
    )


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def put(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


UP = "model.layers.1.mlp.up_proj"  # 64 inputs, 96 outputs
Damage = Callable[[Tensors], Tensors]
BROKEN_GPTQ: dict[str, tuple[Damage, str]] = {
    "no scales": (without(f"{UP}.scales"), rf"tensor {UP}\.scales of a quantised module is missing"),
    "no zeros": (without(f"{UP}.qzeros"), rf"tensor {UP}\.qzeros of a quantised module is missing"),
    "no words": (without(f"{UP}.qweight"), rf"tensor {UP}\.(g_idx|qzeros|scales) is not known"),
    "a module that is not known": (
        put("model.layers.1.mlp.extra.qweight", torch.zeros(8, 8, dtype=torch.int32)),
        r"tensor model\.layers\.1\.mlp\.extra\.qzeros of a quantised module is missing",
    ),
    "plain, too": (put(f"{UP}.weight", torch.zeros(96, 64)), rf"tensor {UP}\.weight is there twice"),
    "groups of another size": (
        put(f"{UP}.scales", torch.ones(3, 96, dtype=torch.float16)),
        rf"tensor {UP}\.scales has shape \(3, 96\), not \(2, 96\)",
    ),
    "zeros of another size": (
        put(f"{UP}.qzeros", torch.zeros(2, 96, dtype=torch.int32)),
        rf"tensor {UP}\.qzeros has shape \(2, 96\), not \(2, 12\)",
    ),
    "words of 16 bits": (
        put(f"{UP}.qweight", torch.zeros(8, 96, dtype=torch.int16)),
        rf"tensor {UP}\.qweight is stored as I16; allowed: I32",
    ),
    "scales of integers": (
        put(f"{UP}.scales", torch.ones(2, 96, dtype=torch.int32)),
        rf"tensor {UP}\.scales is stored as I32; allowed: F16, BF16, F32",
    ),
    "another matrix": (
        lambda tensors: (
            tensors
            | {
                f"{UP}.qweight": torch.zeros(8, 88, dtype=torch.int32),
                f"{UP}.qzeros": torch.zeros(2, 11, dtype=torch.int32),
                f"{UP}.scales": torch.ones(2, 88, dtype=torch.float16),
            }
        ),
        rf"tensor {UP}\.weight has shape \(88, 64\), not \(96, 64\)",
    ),
    "a row": (put(f"{UP}.qweight", torch.zeros(96, dtype=torch.int32)), "which is no matrix"),
    "floats of 8 bits": (
        put("model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)),
        r"tensor model\.norm\.weight is stored as F8_E4M3.*original weights",
    ),
}


def load(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    load_weights(Decoder(checkpoint.config, KERNELS, dtype=torch.float32, device="cpu"), checkpoint)


def damaged(folder: Path, damage: Damage) -> None:
    found = damage(load_file(folder / WEIGHTS))
    save_file({name: tensor.clone() for name, tensor in found.items()}, folder / WEIGHTS, {"format": "pt"})


def never(*_: object) -> None:
    raise AssertionError("a weight was read")


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("gptq") / "model")
    return write(folder, gptq(32), GPTQ)[0]


@pytest.fixture
def gptq_tensors(gptq_folder: Path) -> Any:
    before = (gptq_folder / WEIGHTS).read_bytes()
    yield gptq_folder
    (gptq_folder / WEIGHTS).write_bytes(before)


@pytest.mark.parametrize("name", BROKEN_GPTQ)
def test_tensors_are_named_before_any_weight_is_read(
    gptq_tensors: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, says = BROKEN_GPTQ[name]
    damaged(gptq_tensors, damage)
    monkeypatch.setattr(_SafetensorsSource, "copy", never)
    monkeypatch.setattr(_SafetensorsSource, "read", never)
    with pytest.raises(UnsupportedCheckpoint, match=says):
        load(gptq_tensors)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (put(f"{UP}.bias", torch.ones(96)), rf"tensor {UP}\.bias is not known"),
        (
            put(f"{UP}.g_idx", torch.tensor([0] * 33 + [1] * 31, dtype=torch.int32)),
            rf"tensor {UP}\.g_idx does not give every group 32 inputs",
        ),
        (put(f"{UP}.g_idx", torch.full((64,), 7, dtype=torch.int32)), "does not give every group"),
        (
            put(f"{UP}.qzeros", torch.full((2, 12), -1, dtype=torch.int32)),
            rf"tensor {UP}\.qzeros stores 15 as a zero less 1.*gptq_v2",
        ),
    ],
)
def test_values_that_mean_nothing_are_named_while_they_are_read(
    gptq_tensors: Path, damage: Damage, says: str
) -> None:
    damaged(gptq_tensors, damage)
    with pytest.raises(UnsupportedCheckpoint, match=says):
        load(gptq_tensors)


def test_act_order_needs_its_order(gptq_tensors: Path) -> None:
    config = json.loads((gptq_tensors / "config.json").read_text())
    damaged(gptq_tensors, without(f"{UP}.g_idx"))
    load(gptq_tensors)
    config["quantization_config"]["desc_act"] = True
    try:
        (gptq_tensors / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedCheckpoint, match=rf"{UP}\.g_idx of a quantised module is missing"):
            load(gptq_tensors)
    finally:
        config["quantization_config"]["desc_act"] = False
        (gptq_tensors / "config.json").write_text(json.dumps(config))


def test_a_module_that_config_json_calls_plain_must_be(tmp_path: Path) -> None:
    config = {**FP8, "modules_to_not_convert": ["model.layers.1.mlp"]}
    folder, _ = write(write_tiny_llama(tmp_path / "model"), float8(32, 32, "weight_scale_inv"), config)
    with pytest.raises(
        UnsupportedCheckpoint, match=r"layers\.1\.mlp\.\w+\.weight is quantised, but config\.json lists"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("weight_scale_inv", without(f"{UP}.weight_scale_inv"), rf"{UP}\.weight_scale_inv of .* is missing"),
        ("weight_scale", lambda tensors: tensors, r"weight_scale_inv of a quantised module is missing"),
        (
            "weight_scale_inv",
            put(f"{UP}.weight_scale_inv", torch.ones(2, 3)),
            rf"{UP}\.weight_scale_inv has shape \(2, 3\), not \(3, 2\)",
        ),
        ("weight_scale_inv", put(f"{UP}.k_scale", torch.ones(1)), rf"tensor {UP}\.k_scale is not known"),
        ("weight_scale_inv", put("lm_head.weight_scale_inv", torch.ones(1)), r"lm_head\.weight_scale_inv is not kn"),
    ],
)  # fmt: skip
def test_scales_of_floats_are_as_strictly_read(tmp_path: Path, name: str, damage: Damage, says: str) -> None:
    folder, _ = write(write_tiny_llama(tmp_path / "model"), float8(32, 32, name), FP8)
    damaged(folder, damage)
    with pytest.raises(UnsupportedCheckpoint, match=says):
        load(folder)


def test_matrices_that_are_stored_transposed_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "GPT2LMHeadModel", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": dict(GPTQ)}))
    with pytest.raises(UnsupportedCheckpoint, match=r"gptq.* not supported for GPT2LMHeadModel"):
        Checkpoint.open(str(tmp_path))
