"""The engine end to end on the triton kernels, in triton's interpreter: the tokens of the reference set, with pages
that are shared, sequences that are preempted, and NaN in every page that holds nothing of value.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.determinism import PADDED_ROWS
from engine.engine import Engine
from engine.linear import Linear
from engine.memory import bytes_per_page
from engine.request import Completion, Request, RequestId
from engine.resolved_settings import resolve_kv_cache_dtype
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from kernels import KernelSet, kernels_for
from tests.support.families import write_tiny
from tests.support.family_models import MODELS
from tests.support.pressure import poison_free_pages
from tests.support.tiny import write_tiny_llama

PAGE_SIZE, NUM_PAGES, NEW_TOKENS = 16, 6, 6  # all three would need 8 pages at their end
SHARED = tuple(range(20, 20 + 2 * PAGE_SIZE))
PROMPTS = {
    "first": (*SHARED, *range(60, 74)),
    "other": tuple(range(5, 19)),
    "second": (*SHARED, *range(80, 93)),
}


def answers(
    model: Path, kernels: KernelSet, storage: str, *, deterministic: bool = True
) -> dict[str, tuple[int, ...]]:
    checkpoint = Checkpoint.open(str(model))
    stored = resolve_kv_cache_dtype(storage, torch.float32, kernels_for("cpu", kernels))
    engine = Engine.load(
        EngineConfig(
            model=str(model),
            device="cpu",
            dtype="float32",
            kernels=kernels,
            page_size=PAGE_SIZE,
            max_model_len=64,
            max_num_seqs=3,
            max_num_batched_tokens=40,
            kv_cache_dtype=storage,  # type: ignore[arg-type]
            kv_cache_memory_bytes=NUM_PAGES * bytes_per_page(checkpoint.config, PAGE_SIZE, stored),
            deterministic=deterministic,
            threads=1,
        )
    )
    assert engine.pool.num_pages == NUM_PAGES
    assert engine.runner.kernels_name == kernels
    assert isinstance(engine.runner, ModelRunner)
    assert engine.runner.deterministic == deterministic
    # in fp32 only the kernels' own products need no padding
    assert engine.runner._row_multiple == (1 if kernels == "triton" else PADDED_ROWS)
    sampling = SamplingParams(temperature=0.0, seed=1, max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [
        Request(id=RequestId(name, 1), prompt_token_ids=prompt, sampling=sampling)
        for name, prompt in PROMPTS.items()
    ]
    done: dict[RequestId, Completion] = {}
    for request in requests:
        engine.add(request)
    for step in itertools.count():
        if not engine.has_work:
            break
        if step == 4:
            engine.scheduler.preempt(engine.scheduler.running[0])
        poison_free_pages(engine)
        done |= {completion.id: completion for completion in engine.step()}
        engine.check()
    assert sum(completion.num_cached_tokens for completion in done.values()) >= len(SHARED)
    assert engine.stats()["num_preemptions"] > 0
    return {key.job_id: completion.outputs[0].token_ids for key, completion in done.items()}


INTERPRETED = pytest.mark.interpreted


@pytest.mark.parametrize(
    ("storage", "deterministic"),
    [
        pytest.param("auto", False, marks=pytest.mark.long),
        pytest.param("auto", True, marks=INTERPRETED),  # also the products, which takes them long here
        pytest.param("int8", False, marks=INTERPRETED),
        pytest.param("fp8", True, marks=INTERPRETED),
    ],
)
def test_an_engine_under_pressure_gives_the_tokens_of_the_reference(
    tmp_path: Path, storage: str, deterministic: bool
) -> None:
    model = write_tiny_llama(tmp_path, num_layers=2)
    expected = answers(model, "reference", storage)
    found = answers(model, "triton", storage, deterministic=deterministic)
    assert found == expected
    assert all(len(tokens) == NEW_TOKENS for tokens in found.values())


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param("MixtralForCausalLM", marks=pytest.mark.long),
        pytest.param("Qwen3MoeForCausalLM", marks=INTERPRETED),
    ],
)
def test_so_does_one_whose_kernels_mix_experts(tmp_path: Path, architecture: str) -> None:
    write_tiny(tmp_path, architecture, MODELS[architecture][0] | {"num_hidden_layers": 1})
    expected = answers(tmp_path, "reference", "auto")
    assert answers(tmp_path, "triton", "auto", deterministic=False) == expected


@INTERPRETED
def test_so_does_one_with_sinks_and_experts_with_biases(tmp_path: Path) -> None:
    write_tiny(tmp_path, "GptOssForCausalLM", MODELS["GptOssForCausalLM"][0] | {"num_hidden_layers": 1})
    expected = answers(tmp_path, "reference", "auto")
    assert answers(tmp_path, "triton", "auto", deterministic=False) == expected


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_computed_by_the_kernels_has_its_weight_back_in_the_plain_order(bias: bool) -> None:
    kernels = kernels_for("cpu", "triton")
    matmul = kernels.matmul
    assert matmul is not None
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    gain = torch.randn(48).bfloat16() if bias else None
    product = Linear(weight, gain)
    product.compute_by(kernels)
    assert torch.equal(product(x), matmul(x, weight, gain))
    assert product.shape == (48, 64, bias)
