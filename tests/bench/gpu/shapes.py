"""Shapes: models that are measured, with random weights and without any file.

Owns their sizes, in the words of a `config.json`, and how such a model is filled. What a config means is read by
`engine.families`, as it is for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from engine.config import EngineConfig
from engine.config_json import model_config
from engine.engine import Engine
from engine.kept_weights import WeightFormat
from engine.model import Decoder
from engine.model_config import ModelConfig
from engine.runner import ModelRunner
from kernels import kernels_for
from kernels.weights import Int4Weight, QuantisedWeight
from tests.bench.gpu.setting import Setting

SPREAD = 0.02
_QWEN3: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "dtype": "bfloat16",
    "num_key_value_heads": 8,
}
QWEN3_06B: Mapping[str, Any] = {
    **_QWEN3,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
QWEN3_8B: Mapping[str, Any] = {
    **_QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B: Mapping[str, Any] = {  # with a quarter of its layers
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_TINY_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def shape(published: Mapping[str, Any], *, tiny: bool) -> dict[str, Any]:
    """A config.json; `tiny`: of the same kind, and small."""
    small = _TINY | (_TINY_EXPERTS if "num_experts" in published else {})
    return {**published, **(small if tiny else {})}


def random_decoder(
    config: ModelConfig,
    setting: Setting,
    kept: Mapping[str, WeightFormat] | None = None,
    *,
    mixes_experts: bool = True,
) -> Decoder:
    """Matrices of normal numbers, quantised ones of numbers as large, norms of ones; not yet prepared."""
    kernels = kernels_for(setting.device, setting.kernels)
    if not mixes_experts:
        kernels = replace(kernels, mix_experts=None)
    with torch.inference_mode():
        decoder = Decoder(config, kernels, dtype=torch.bfloat16, device=setting.device, kept=kept)
        generator = torch.Generator(setting.device).manual_seed(0)
        for weight in decoder.quantised.values():
            fill(weight, generator)
        for parameter in decoder.parameters.values():
            if parameter.is_meta:
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, SPREAD, generator=generator)
    return decoder


def fill(weight: QuantisedWeight, generator: torch.Generator) -> None:
    if isinstance(weight, Int4Weight):
        weight.words.random_(generator=generator)
        zeros = torch.full(weight.groups.shape, 8, device=weight.groups.device)
        weight.put_groups(zeros, torch.full_like(zeros, SPREAD / 4.6, dtype=torch.float16))
    else:
        for rows in weight.floats.split(4096):
            rows.copy_(torch.randn(rows.shape, generator=generator, device=rows.device) * 64)
        weight.scales.fill_(SPREAD / 64)


def random_engine(
    published: Mapping[str, Any],
    setting: Setting,
    *,
    max_model_len: int,
    max_num_batched_tokens: int,
    kept: Mapping[str, WeightFormat] | None = None,
    mixes_experts: bool = True,
    **more: Any,
) -> Engine:
    """An engine over such a model, without a tokenizer. `mixes_experts`: as one operation, where the kernels have it.
    `more`: of `EngineConfig`."""
    config = EngineConfig(
        model="random",
        device="cuda" if setting.on_gpu else "cpu",
        dtype="bfloat16",
        kernels=setting.kernels,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        swap_space_bytes=0,  # pinning host memory takes seconds, and nothing here is to be preempted
        **more,
    )
    model = model_config(shape(published, tiny=setting.tiny))
    decoder = random_decoder(model, setting, kept, mixes_experts=mixes_experts)
    return Engine(ModelRunner.over(decoder, config), None, config)
