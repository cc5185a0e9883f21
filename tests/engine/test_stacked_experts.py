"""Quantised experts that files have one by one lie side by side: what is kept, and answers as those of experts that
are computed one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine import determinism
from engine.checkpoint import Checkpoint
from engine.experts import Experts, FirstExpert, MixedExperts
from engine.kept_weights import Float8Format, StackFormat, kept_formats
from engine.parameters import expert_stacks
from engine.weight_source import open_source
from kernels import kernels_for
from kernels.reference import KERNELS
from kernels.weights import Float8Experts, Float8Weight, Int4Experts, Int4Weight
from tests.engine.test_kept_weights import CASES, answers, loaded
from tests.support.families import write_tiny
from tests.support.quantised import write

TRITON = kernels_for("cpu", "triton")
ONE_BY_ONE = dataclasses.replace(TRITON, mix_experts=None, keeps=(Int4Weight, Float8Weight))
FORMATS = {"fp8 blocks": Float8Experts, "channels": Float8Experts, "awq": Int4Experts, "gptq": Int4Experts}


def written(folder: Path, name: str, *, plain_experts: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A Qwen3-MoE of one layer: quantised, and of the same weights stored plainly."""
    sizes = {
        "hidden_size": 256,
        "head_dim": 64,
        "num_hidden_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    }
    write_tiny(folder / "model", "Qwen3MoeForCausalLM", sizes)
    quantiser, config = CASES[name]
    keep = ("lm_head", ".gate.", "self_attn", *plain_experts)
    told = {"modules_to_not_convert": list(keep)} if config["quant_method"] in ("fp8", "awq") else {}
    return write(folder / "model", quantiser, config | told, keep=keep)


@pytest.mark.parametrize("name", FORMATS)
def test_they_are_kept_side_by_side_and_mean_the_weights_of_their_formula(tmp_path: Path, name: str) -> None:
    quantised, plain = written(tmp_path, name)
    found, wanted = loaded(quantised, TRITON), loaded(plain, KERNELS)
    stacks = expert_stacks(found.config)
    assert found.quantised.keys() == {*stacks, *(part for parts in stacks.values() for part in parts)}
    for stack, parts in stacks.items():
        whole = found.quantised[stack]
        assert isinstance(whole, FORMATS[name])
        assert not isinstance(whole, Float8Experts) or whole.blocks is (name == "fp8 blocks")
        for number, part in enumerate(parts):
            assert found.parameters[part].is_meta
            assert torch.equal(whole.expert(number).dequantised(), wanted.parameters[part])
    assert found.capturable
    assert found.scratch_bytes == 0
    found.prepare(64)
    assert not found.quantised
    assert not found.parameters
    mlp = found._blocks[0].mlp
    assert isinstance(mlp, MixedExperts)
    first = mlp.products[1]
    assert isinstance(first, FirstExpert)
    assert isinstance(first._mixture.down, FORMATS[name])
    assert first._mixture.down.shape == (1, 256, 128)


def test_a_model_with_an_expert_that_is_plain_computes_them_one_by_one(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, "fp8 blocks", plain_experts=("experts.1.",))
    decoder = loaded(folder, TRITON)
    assert not decoder.capturable
    assert len(decoder.quantised) == 2 * 3
    assert all(isinstance(weight, Float8Weight) for weight in decoder.quantised.values())
    decoder.prepare(64)
    assert isinstance(decoder._blocks[0].mlp, Experts)


def test_experts_whose_inputs_have_an_order_are_computed_one_by_one(tmp_path: Path) -> None:
    decoder = loaded(written(tmp_path, "gptq act-order")[0], TRITON)
    assert not decoder.capturable
    assert all(isinstance(weight, Int4Weight) for weight in decoder.quantised.values())


def test_what_is_kept_is_asked_of_the_set(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(written(tmp_path, "fp8 blocks")[0]))
    source = open_source(checkpoint, ())
    assert set(kept_formats(source, checkpoint.config, (Float8Weight,)).values()) == {
        Float8Format(blocks=True)
    }
    found = kept_formats(source, checkpoint.config, (Float8Weight, Float8Experts))
    assert found == dict.fromkeys(expert_stacks(checkpoint.config), StackFormat(Float8Format(blocks=True)))


@pytest.mark.parametrize(
    "name",
    ["fp8 blocks", *(pytest.param(one, marks=pytest.mark.interpreted) for one in ("channels", "gptq"))],
)
def test_the_tokens_are_those_of_experts_one_by_one(tmp_path: Path, name: str) -> None:
    folder, _ = written(tmp_path, name)
    expected = answers(folder, ONE_BY_ONE)
    assert answers(folder, TRITON) == expected
    assert len(set(expected[0])) > 2


@pytest.mark.interpreted
def test_the_tokens_in_deterministic_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the check of products, of fewer rows than elsewhere, looks at the first expert."""
    monkeypatch.setitem(determinism._OWN_CHECK_FLOPS, "cpu", 1)
    folder, _ = written(tmp_path, "fp8 blocks")
    assert answers(folder, TRITON, deterministic=True) == answers(folder, ONE_BY_ONE)
