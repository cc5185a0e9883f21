"""Checkpoints of other names and layouts than Llama's fill the same parameters, and are as strictly read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import Checkpoint, UnsupportedCheckpoint
from engine.model import Decoder
from engine.weights import load_weights
from kernels.reference import KERNELS
from tests.support.families import write_tiny

Tensors = dict[str, Tensor]
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24}


def parameters(folder: Path) -> Tensors:
    checkpoint = Checkpoint.open(str(folder))
    decoder = Decoder(checkpoint.config, KERNELS, dtype=torch.float32, device="cpu")
    for parameter in decoder.parameters.values():
        parameter.fill_(float("nan"))
    load_weights(decoder, checkpoint)
    assert not any(parameter.isnan().any() for parameter in decoder.parameters.values())
    return decoder.parameters


def rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    made = {name: tensor.clone().contiguous() for name, tensor in change(tensors).items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


def tiny(folder: Path, architecture: str, **changes: Any) -> Path:
    write_tiny(folder, architecture, changes)
    return folder


def test_gpt2_is_the_same_without_its_prefix_and_with_its_masks(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "GPT2LMHeadModel")
    before = parameters(folder)

    def as_published(tensors: Tensors) -> Tensors:
        short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return {**short, "h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.ones(1)}

    after = parameters(rewritten(folder, as_published))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_neox_masks_and_frequencies_are_ignored_and_its_biases_are_not(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "GPTNeoXForCausalLM")
    layer = "gpt_neox.layers.0.attention"
    old = {
        f"{layer}.bias": torch.ones(1, 1, 4, 4),
        f"{layer}.masked_bias": torch.ones(1),
        f"{layer}.rotary_emb.inv_freq": torch.ones(2),
    }
    parameters(rewritten(folder, lambda tensors: tensors | old))
    with pytest.raises(UnsupportedCheckpoint, match=r"o_proj\.bias is missing"):
        parameters(
            rewritten(folder, lambda found: {k: v for k, v in found.items() if k != f"{layer}.dense.bias"})
        )


def test_grouped_heads_are_sorted_into_queries_keys_and_values(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2)
    stored = load_file(folder / "model.safetensors")["transformer.h.1.self_attention.query_key_value.weight"]
    heads = stored.split(16)  # kv head 0: two of q, k, v; then kv head 1
    wanted = torch.cat([heads[i] for i in (0, 1, 4, 5, 2, 6, 3, 7)])
    assert torch.equal(parameters(folder)["model.layers.1.self_attn.qkv_proj.weight"], wanted)


def test_channels_that_turn_together_are_parted_into_halves(tmp_path: Path) -> None:
    """Of heads of 16 channels GLM rotates the first 8; v is not rotated."""
    folder = tiny(tmp_path, "GlmForCausalLM", head_dim=16)
    stored, found = load_file(folder / "model.safetensors"), parameters(folder)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)])
    for kind in ("weight", "bias"):
        q, k, v = (stored[f"model.layers.1.self_attn.{name}_proj.{kind}"] for name in "qkv")
        turned = [part.view(-1, 16, *part.shape[1:])[:, order].reshape(part.shape) for part in (q, k)]
        assert torch.equal(found[f"model.layers.1.self_attn.qkv_proj.{kind}"], torch.cat([*turned, v]))


def test_experts_may_be_stored_as_one_tensor(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "Qwen3MoeForCausalLM", **MOE)
    before = parameters(folder)

    def fused(tensors: Tensors) -> Tensors:
        made = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer in range(2):
            part = f"model.layers.{layer}.mlp.experts"

            def of(expert: int, name: str, part: str = part) -> Tensor:
                return tensors[f"{part}.{expert}.{name}_proj.weight"]

            made[f"{part}.down_proj"] = torch.stack([of(e, "down") for e in range(2)])
            made[f"{part}.gate_up_proj"] = torch.stack(
                [torch.cat([of(e, "gate"), of(e, "up")]) for e in range(2)]
            )
        return made

    after = parameters(rewritten(folder, fused))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("architecture", "fields", "added", "named"),
    [
        ("GPT2LMHeadModel", {}, "transformer.h.0.crossattention.c_attn.weight", "crossattention"),
        ("GPT2LMHeadModel", {}, "h.0.ln_1.weight", "is there twice"),
        ("FalconForCausalLM", {}, "transformer.h.0.post_attention_layernorm.weight", "not known"),
        ("Qwen3MoeForCausalLM", MOE, "model.layers.0.mlp.experts.2.up_proj.weight", "experts.2"),
        ("Qwen3MoeForCausalLM", MOE, "model.layers.0.mlp.shared_expert_gate.weight", "shared_expert_gate"),
    ],
)
def test_what_has_no_place_is_named(
    tmp_path: Path, architecture: str, fields: dict[str, Any], added: str, named: str
) -> None:
    folder = tiny(tmp_path, architecture, **fields)
    with pytest.raises(UnsupportedCheckpoint, match=named):
        parameters(rewritten(folder, lambda tensors: tensors | {added: torch.ones(64)}))


def test_a_stacked_tensor_that_lacks_an_expert_is_noticed(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "MixtralForCausalLM", num_local_experts=3)

    def without_the_last(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if ".experts.2.w3" not in name}

    with pytest.raises(UnsupportedCheckpoint, match=r"experts\.2\.up_proj\.weight is missing"):
        parameters(rewritten(folder, without_the_last))
