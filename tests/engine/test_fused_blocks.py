"""A decoder whose blocks are one operation gives what it gives operation by operation; others stay as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Completion, RequestId
from engine.runner import ModelRunner, load_decoder
from engine.tokenizer import Tokenizer
from kernels import Kernels, kernels_for
from tests.engine.test_alone_equals_crowd import make_requests
from tests.support.families import write_tiny
from tests.support.pressure import run
from tests.support.tiny import EOS_TOKEN_ID

DTYPES = torch.bfloat16, torch.float32
CPU = replace(kernels_for("cpu", "cpu"), multiplies=DTYPES)  # its own products, also where others are faster
FUSED: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
    "Qwen3ForCausalLM": {},  # norms of heads
    "MistralForCausalLM": {"sliding_window": 24},
}
NOT_FUSED: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": {},  # norms of what halves add
    "Olmo2ForCausalLM": {},  # norms of all heads as one
    "GPT2LMHeadModel": {},  # layer norms
}


def loaded(folder: Path, kernels: Kernels, **settings: Any) -> ModelRunner:
    config = EngineConfig(model=str(folder), device="cpu", max_num_seqs=8, page_size=16, **settings)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    with torch.inference_mode():
        decoder = load_decoder(Checkpoint.open(str(folder)), kernels, dtype=dtype, device="cpu")
    return ModelRunner.over(decoder, config)


def is_fused(runner: ModelRunner) -> bool:
    decoder = runner._decoder
    return getattr(decoder, "_fused", None) is not None


def answers(runner: ModelRunner, folder: Path) -> dict[RequestId, Completion]:
    config = EngineConfig(model=str(folder), device="cpu", max_num_seqs=8)
    tokenizer = Tokenizer.open(Checkpoint.open(str(folder)))
    return run(Engine(runner, tokenizer, config), make_requests(8))


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"dtype": "float32", "kv_cache_dtype": "int8"}], ids=["bf16", "int8"]
)
def test_tokens_and_logprobs_are_the_same(
    tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    write_tiny(tmp_path, architecture, FUSED[architecture] | {"eos_token_id": EOS_TOKEN_ID})
    together, apart = loaded(tmp_path, CPU, **settings), loaded(tmp_path, replace(CPU, fuse=None), **settings)
    assert is_fused(together)
    assert not is_fused(apart)
    assert answers(together, tmp_path) == answers(apart, tmp_path)


@pytest.mark.parametrize("architecture", NOT_FUSED)
def test_blocks_of_other_kinds_are_not(tmp_path: Path, architecture: str) -> None:
    write_tiny(tmp_path, architecture, NOT_FUSED[architecture])
    assert not is_fused(loaded(tmp_path, CPU, dtype="bfloat16"))


def test_products_that_become_the_kernels_own_are_fused(tmp_path: Path) -> None:
    write_tiny(tmp_path, "LlamaForCausalLM", {})
    runner = loaded(tmp_path, replace(CPU, multiplies=()), dtype="bfloat16")
    decoder = runner._decoder
    if not decoder.own_products:
        assert not is_fused(runner)
        assert decoder.invariant_products()
    assert is_fused(runner)


def test_integer_products_are_not(tmp_path: Path) -> None:
    write_tiny(tmp_path, "LlamaForCausalLM", {})
    config = EngineConfig(model=str(tmp_path), device="cpu", max_num_seqs=8)
    with torch.inference_mode():
        checkpoint = Checkpoint.open(str(tmp_path))
        decoder = load_decoder(checkpoint, CPU, dtype=torch.bfloat16, device="cpu", int8=True)
    assert not is_fused(ModelRunner.over(decoder, config))
