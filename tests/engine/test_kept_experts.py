"""Experts that stay in 4 bits: what is kept, bit for bit, in how much memory, and answers as those of plain ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import determinism
from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.experts import FirstExpert, MixedExperts
from engine.kept_weights import Float4Format, kept_formats
from engine.model import Decoder
from engine.parameters import expert_stacks, parameter_shapes
from engine.weight_source import open_source
from kernels import Kernels, kernels_for
from kernels.reference import KERNELS
from kernels.weights import Float4Weight, Float8Weight, Int4Weight
from tests.engine.test_kept_weights import answers, loaded
from tests.engine.test_mxfp4 import put, write
from tests.engine.test_published_configs import GPT_OSS_20B
from tests.support.launches import recorded
from tests.support.quantised import WEIGHTS

TRITON = kernels_for("cpu", "triton")
EXPERTS = {f"model.layers.{i}.mlp.experts.{kind}_proj" for i in (0, 1) for kind in ("gate_up", "down")}


def mixed(folder: Path, kernels: Kernels = TRITON, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    with torch.inference_mode():
        return loaded(folder, kernels, dtype)


def assert_same(quantised: Path, plain: Path, kept: set[str]) -> None:
    """Exactly `kept` stacks stay in 4 bits, and all parameters stand for the plain ones: gates above ups."""
    found, wanted = mixed(quantised), mixed(plain, KERNELS)
    assert found.quantised.keys() == {f"{name}.weight" for name in kept}
    stands = dict(found.parameters)
    for name, weight in found.quantised.items():
        parts = expert_stacks(found.config)[name]
        assert all(found.parameters[part].is_meta for part in parts)
        stands |= zip(parts, weight.dequantised(), strict=True)
    assert stands.keys() == wanted.parameters.keys()
    for name, parameter in wanted.parameters.items():
        assert torch.equal(stands[name].bfloat16(), parameter), name


def test_experts_are_kept_and_mean_what_transformers_makes_of_them(tmp_path: Path) -> None:
    assert_same(*write(tmp_path), EXPERTS)


def test_of_layers_stored_differently_each_is_kept_as_it_is(tmp_path: Path) -> None:
    quantised, plain = write(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors = load_file(quantised / WEIGHTS)
    del tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    save_file(tensors | {name: load_file(plain / WEIGHTS)[name]}, quantised / WEIGHTS, {"format": "pt"})
    assert_same(quantised, plain, EXPERTS - {name})


def test_sets_that_mix_no_experts_make_them_plain(tmp_path: Path) -> None:
    folder, _ = write(tmp_path)
    sets = (KERNELS, kernels_for("cpu", "cpu"), dataclasses.replace(TRITON, keeps=(Int4Weight, Float8Weight)))
    for kernels in sets:
        assert Float4Weight not in kernels.keeps
        decoder = mixed(folder, kernels)
        assert not decoder.quantised
        assert not any(parameter.is_meta for parameter in decoder.parameters.values())


def test_experts_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    folder, _ = write(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors = put(f"{name}_blocks", 3, 192, 3, 16)(load_file(folder / WEIGHTS))
    save_file(put(f"{name}_scales", 3, 192, 3)(tensors), folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnsupportedCheckpoint, match=rf"{name} has shape \(3, 96, 192\), not \(3, 64, 192\)"):
        mixed(folder)


def test_a_model_whose_inputs_are_no_blocks_is_refused_by_name(tmp_path: Path) -> None:
    folder, _ = write(tmp_path)
    told = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 90}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(UnsupportedCheckpoint, match=r"experts\.\w+ has shape .*, not"):
        mixed(folder)


def test_the_blocks_of_a_decoder_hold_them_and_nothing_else_does(tmp_path: Path) -> None:
    decoder = mixed(write(tmp_path)[0])
    assert decoder.capturable
    assert decoder.scratch_bytes == 0  # a step makes none of them plain
    decoder.prepare(64)
    assert not decoder.quantised
    assert not decoder.parameters
    for block in decoder._blocks:
        assert isinstance(block.mlp, MixedExperts)
        first = block.mlp.products[1]
        assert isinstance(first, FirstExpert)
        assert first.shape == (2 * 96 + 96, 64, False)
        assert isinstance(first._mixture.gate_up, Float4Weight)
        assert first._mixture.down.shape == (1, 64, 96)


def test_a_step_makes_nothing_plain(tmp_path: Path) -> None:
    """The launches of plain experts, and no other work."""
    found: list[list[str]] = []
    for folder in write(tmp_path, layers=1):
        decoder = mixed(folder)
        decoder.prepare(64)
        with torch.inference_mode(), recorded() as launches:
            decoder._blocks[0].mlp(torch.ones(2, 64, dtype=torch.bfloat16))
        found.append([launch.name for launch in launches])
    assert found[0] == found[1]
    assert found[0].count("grouped_kernel") == 2


@pytest.mark.parametrize(("layers", "experts", "gigabytes"), [(24, 32, 10.2), (36, 128, 60.9)])
def test_the_published_models_take_17_bits_for_32(
    tmp_path: Path, layers: int, experts: int, gigabytes: float
) -> None:
    """Of gpt-oss-20b and gpt-oss-120b: all experts, and not a byte more."""
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    sizes = {"num_hidden_layers": layers, "num_local_experts": experts, "layer_types": kinds}
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B | sizes))
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / WEIGHTS, {"format": "pt"})
    config = Checkpoint.open(str(tmp_path)).config
    stacks = [name for name in expert_stacks(config) if name.endswith(".weight")]
    kept = dict.fromkeys(stacks, Float4Format())
    decoder = Decoder(config, TRITON, dtype=torch.bfloat16, device="meta", kept=kept)
    shapes = parameter_shapes(config)
    weights = sum(
        shapes[part][0] * shapes[part][1] for name in stacks for part in expert_stacks(config)[name]
    )
    found = sum(weight.num_bytes for weight in decoder.quantised.values())
    assert found == weights * 17 // 32
    assert round(found / 1e9, 1) == gigabytes


def test_what_is_kept_is_asked_of_the_set(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write(tmp_path)[0]))
    source = open_source(checkpoint, ())
    assert not kept_formats(source, checkpoint.config, (Int4Weight, Float8Weight))
    found = kept_formats(source, checkpoint.config, (Float4Weight,))
    assert found.keys() == {f"{name}.weight" for name in EXPERTS}


def test_the_tokens_are_those_of_the_experts_made_plain(tmp_path: Path) -> None:
    quantised, plain = write(tmp_path, layers=1)
    expected = answers(plain, KERNELS)
    assert answers(quantised, TRITON) == expected
    assert len(set(expected[0])) > 2


@pytest.mark.interpreted
def test_the_tokens_in_deterministic_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the check of products, of fewer rows than elsewhere, looks at the first expert."""
    monkeypatch.setitem(determinism._OWN_CHECK_FLOPS, "cpu", 1)
    quantised, plain = write(tmp_path, layers=1)
    assert answers(quantised, TRITON, deterministic=True) == answers(plain, KERNELS)
