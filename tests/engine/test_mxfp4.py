"""Experts in MXFP4 hold, bit for bit, what the format says and transformers makes of it, and answer as those do."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine import LLM, SamplingParams, stored_tensors
from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.dequantise import scaled_blocks
from engine.model import Decoder
from engine.placement import placed, weight_targets
from engine.weight_source import _SafetensorsSource, open_source
from kernels.reference import KERNELS
from tests.engine.test_published_configs import GPT_OSS_20B
from tests.support.families import write_tiny
from tests.support.loaded import parameters
from tests.support.quantised import WEIGHTS
from tests.support.tiny import write_tiny_llama

SIZES = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 9}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
UP = "model.layers.1.mlp.experts.gate_up_proj"  # of 3 experts: 192 outputs, 64 inputs
Tensors = dict[str, Tensor]
Damage = Callable[[Tensors], Tensors]


def write(folder: Path, *, layers: int = 2, **config: Any) -> tuple[Path, Path]:
    """Two folders: random blocks and scales, and what transformers makes of them in bf16, stored plainly."""
    quantised, plain = folder / "quantised", folder / "plain"
    write_tiny(quantised, "GptOssForCausalLM", SIZES | {"num_hidden_layers": layers})
    shutil.copytree(quantised, plain)
    packed, unpacked = {}, {}
    generator = torch.Generator().manual_seed(2)
    for name, tensor in load_file(quantised / WEIGHTS).items():
        packed[name] = unpacked[name] = tensor
        if tensor.dim() == 3:
            del packed[name]
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(121, 126, shape, dtype=torch.uint8, generator=generator)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            unpacked[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
    save_file(packed, quantised / WEIGHTS, {"format": "pt"})
    save_file(unpacked, plain / WEIGHTS, {"format": "pt"})
    told = json.loads((plain / "config.json").read_text()) | {"quantization_config": MXFP4 | config}
    (quantised / "config.json").write_text(json.dumps(told))
    return quantised, plain


def e2m1(bits: int) -> float:
    """Sign, two bits of exponent with a bias of 1, one of mantissa."""
    sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
    value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -value if sign else value


@pytest.mark.parametrize("scale", [0, 1, 100, 127, 128, 200, 252])
def test_each_byte_is_two_floats_and_each_scale_a_power_of_two(scale: int) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    found = scaled_blocks(blocks, torch.full((1, 16), scale, dtype=torch.uint8))
    halves = [half for byte in range(256) for half in (byte & 15, byte >> 4)]
    assert found[0].tolist() == [e2m1(half) * 2.0 ** (scale - 127) for half in halves]
    assert torch.equal(found.bfloat16().float(), found)


def test_each_block_has_a_scale_of_its_own_and_255_is_none() -> None:
    blocks = torch.full((2, 2, 16), 0x42, dtype=torch.uint8)  # 1 and 2
    found = scaled_blocks(blocks, torch.tensor([[127, 128], [126, 255]], dtype=torch.uint8))
    assert found[:, ::16].tolist()[0] == [1, 1, 2, 2]
    assert found[1, :32].tolist() == [0.5, 1.0] * 16
    assert found[1, 32:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("together", [stored_tensors.WEIGHTS_AT_ONCE, 64 * 7])
def test_parameters_are_those_of_transformers(
    tmp_path: Path, dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_tensors, "WEIGHTS_AT_ONCE", together)
    left, right = (parameters(folder, dtype) for folder in write(tmp_path))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_answers_are_those_of_the_plain_weights(tmp_path: Path) -> None:
    quantised, plain = write(tmp_path)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    answers = [
        [
            output.outputs[0].token_ids
            for output in LLM(str(folder), kv_cache_memory_bytes=1 << 22, threads=1).generate(
                ["the night train", "a page", "sleeping"], sampling
            )
        ]
        for folder in (quantised, plain)
    ]
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0]))) == 3


def without(name: str) -> Damage:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def put(name: str, *shape: int, dtype: torch.dtype = torch.uint8) -> Damage:
    return lambda tensors: tensors | {name: torch.zeros(shape, dtype=dtype)}


BROKEN: dict[str, tuple[Damage, str]] = {
    "no scales": (without(f"{UP}_scales"), rf"tensor {UP}_scales of a quantised module is missing"),
    "no blocks": (without(f"{UP}_blocks"), rf"tensor {UP}_blocks of a quantised module is missing"),
    "neither": (
        lambda tensors: {name: one for name, one in tensors.items() if name not in (f"{UP}_scales", f"{UP}_blocks")},
        r"layers\.1\.mlp\.experts\.0\.gate_proj\.weight is missing",
    ),
    "short blocks": (put(f"{UP}_blocks", 3, 192, 2, 8), rf"tensor {UP}_blocks has shape \(3, 192, 2, 8\)"),
    "bytes in a row": (put(f"{UP}_blocks", 3, 192, 32), rf"tensor {UP}_blocks has shape \(3, 192, 32\)"),
    "scales of another size": (
        put(f"{UP}_scales", 3, 192, 3),
        rf"tensor {UP}_scales has shape \(3, 192, 3\), not \(3, 192, 2\)",
    ),
    "blocks of more inputs": (
        lambda tensors: put(f"{UP}_scales", 3, 192, 3)(put(f"{UP}_blocks", 3, 192, 3, 16)(tensors)),
        rf"tensor {UP} has shape \(3, 96, 192\), not \(3, 64, 192\)",
    ),
    "an expert too few": (
        lambda tensors: put(f"{UP}_scales", 2, 192, 2)(put(f"{UP}_blocks", 2, 192, 2, 16)(tensors)),
        rf"tensor {UP} has shape \(2, 64, 192\), not \(3, 64, 192\)",
    ),
    "signed bytes": (
        put(f"{UP}_blocks", 3, 192, 2, 16, dtype=torch.int8),
        rf"tensor {UP}_blocks is stored as I8; allowed: U8",
    ),
    "scales of floats": (
        put(f"{UP}_scales", 3, 192, 2, dtype=torch.float32),
        rf"tensor {UP}_scales is stored as F32; allowed: U8",
    ),
    "plain, too": (put(UP, 3, 64, 192, dtype=torch.float32), rf"tensor {UP} is there twice"),
    "a layer too many": (
        lambda tensors: tensors | {name.replace("rs.1", "rs.2"): one.clone() for name, one in tensors.items()},
        r"tensor model\.layers\.2\..* is not known",
    ),
    "no sinks": (
        without("model.layers.1.self_attn.sinks"),
        r"tensor model\.layers\.1\.self_attn\.sinks is missing",
    ),
    "sinks of fewer heads": (
        put("model.layers.0.self_attn.sinks", 2, dtype=torch.float32),
        r"tensor model\.layers\.0\.self_attn\.sinks has shape \(2,\), not \(4,\)",
    ),
    "no bias of the router": (without("model.layers.0.mlp.router.bias"), r"mlp\.gate\.bias is missing"),
    "no biases of experts": (without(f"{UP}_bias"), r"layers\.1\.mlp\.experts\.0\.gate_proj\.bias is missing"),
    "biases of another size": (
        put(f"{UP}_bias", 3, 96, dtype=torch.float32),
        rf"tensor {UP}_bias has shape \(3, 96\), not \(3, 192\)",
    ),
}  # fmt: skip


def never(*_: object) -> None:
    raise AssertionError("a weight was read")


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_before_any_weight_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, says = BROKEN[name]
    folder, _ = write(tmp_path)
    save_file(damage(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    monkeypatch.setattr(_SafetensorsSource, "copy", never)
    monkeypatch.setattr(_SafetensorsSource, "read", never)
    with pytest.raises(UnsupportedCheckpoint, match=says):
        parameters(folder, torch.float32)


@pytest.mark.parametrize("name", ["model.layers.*.mlp", "model.layers.1.mlp.experts", "re:.*experts$"])
def test_experts_that_config_json_calls_plain_must_be(tmp_path: Path, name: str) -> None:
    folder, _ = write(tmp_path, modules_to_not_convert=["lm_head", name])
    with pytest.raises(
        UnsupportedCheckpoint, match=r"experts\.\w+_blocks is quantised, but config\.json lists"
    ):
        parameters(folder, torch.float32)


def test_the_tensors_of_the_20b_model_have_places(tmp_path: Path) -> None:
    """Of its first layer, in a file that is all hole: names, shapes and dtypes, as published, and no memory."""
    layer, hidden = "model.layers.0", 2880
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (201088, hidden),
        "lm_head.weight": (201088, hidden),
        **{f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")},
        "model.norm.weight": (hidden,),
        f"{layer}.mlp.router.weight": (32, hidden),
        f"{layer}.mlp.router.bias": (32,),
        f"{layer}.self_attn.sinks": (64,),
    }
    for name, outputs, inputs in (
        ("q", 4096, hidden),
        ("k", 512, hidden),
        ("v", 512, hidden),
        ("o", hidden, 4096),
    ):
        shapes[f"{layer}.self_attn.{name}_proj.weight"] = (outputs, inputs)
        shapes[f"{layer}.self_attn.{name}_proj.bias"] = (outputs,)
    for name, outputs in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
        part = f"{layer}.mlp.experts.{name}"
        shapes |= {f"{part}_bias": (32, outputs), f"{part}_scales": (32, outputs, 90)}
        shapes[f"{part}_blocks"] = (32, outputs, 90, 16)
    header, offset = {}, 0
    for name, shape in shapes.items():
        dtype, width = ("U8", 1) if name.endswith(("_blocks", "_scales")) else ("BF16", 2)
        end = offset + width * prod(shape)
        header[name], offset = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}, end
    text = json.dumps(header).encode()
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    one = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B | one))
    checkpoint = Checkpoint.open(str(tmp_path))
    decoder = Decoder(checkpoint.config, KERNELS, dtype=torch.bfloat16, device="meta")
    targets = weight_targets(checkpoint.config)
    found = placed(open_source(checkpoint, targets), targets, decoder, checkpoint)
    merged = {name.removesuffix("_blocks") for name in shapes if not name.endswith("_scales")}
    assert found.keys() == merged


def test_other_families_have_no_such_experts(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": MXFP4}))
    with pytest.raises(UnsupportedCheckpoint, match=r"\(mxfp4\) is not supported for LlamaForCausalLM"):
        Checkpoint.open(str(tmp_path))
