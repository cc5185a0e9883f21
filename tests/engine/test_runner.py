"""ModelRunner: settings, determinism in any crowd and chunking, and failures that stay alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.memory import fitting_pages
from engine.plan import Plan
from engine.runner import ModelRunner
from engine.sampling_params import InvalidParameter, SamplingParams
from tests.support.rollout import rollout
from tests.support.tiny import write_tiny_llama


def load(folder: Path, **settings: Any) -> ModelRunner:
    settings = {"max_num_seqs": 16, **settings}
    return ModelRunner.load(EngineConfig(model=str(folder), **settings), Checkpoint.open(str(folder)))


def work(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    generator = torch.Generator().manual_seed(8)
    prompts = [torch.randint(3, 320, (1 + 7 * i,), generator=generator).tolist() for i in range(count)]
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_k": 9}, {"top_p": 0.8}]
    return prompts, [SamplingParams(seed=i, max_tokens=12, **kinds[i % 4]) for i in range(count)]


def assert_neither_crowd_nor_chunk_matters(runner: ModelRunner) -> None:
    prompts, sampling = work(16)
    together = rollout(runner, prompts, sampling)
    assert rollout(runner, prompts, sampling, chunk=5) == together
    for i in (0, 1, 6, 15):
        assert rollout(runner, prompts[i : i + 1], sampling[i : i + 1], chunk=11) == [together[i]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_depend_on_neither_crowd_nor_chunk(tmp_path: Path, dtype: str) -> None:
    runner = load(write_tiny_llama(tmp_path), dtype=dtype)
    assert runner.deterministic
    assert runner.kernels_name == "cpu"
    assert_neither_crowd_nor_chunk_matters(runner)


def test_the_reference_set_gives_the_same_tokens(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    prompts, sampling = work(8)
    fast = rollout(load(folder, page_size=32), prompts, sampling)
    assert rollout(load(folder, kernels="reference"), prompts, sampling) == fast


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_nan_token_fails_its_own_request_only(tmp_path: Path, kv_cache_dtype: str) -> None:
    runner = load(write_tiny_llama(tmp_path, nan_token_id=300), kv_cache_dtype=kv_cache_dtype)
    prompts = [[5, 6, 7], [5, 300, 7], [8, 9]]
    sampling = [SamplingParams(temperature=0.0, seed=i, max_tokens=6) for i in range(3)]
    clean = rollout(runner, [prompts[0], prompts[2]], [sampling[0], sampling[2]])
    found = rollout(runner, prompts, sampling)
    assert found[1] == [-1]
    # and again, on pages that now hold NaN
    assert [found[0], found[2]] == clean
    assert rollout(runner, [prompts[0], prompts[2]], [sampling[0], sampling[2]]) == clean
    runner.cache.poison(range(runner.num_pages))
    assert rollout(runner, [prompts[0], prompts[2]], [sampling[0], sampling[2]]) == clean


def test_an_empty_plan_is_no_work(tmp_path: Path) -> None:
    assert load(write_tiny_llama(tmp_path)).run(Plan(())) == ([], {}, {}, (), {})


def test_attributes_tell_what_was_loaded(tmp_path: Path) -> None:
    runner = load(write_tiny_llama(tmp_path), max_model_len=100, page_size=32, dtype="bfloat16")
    assert (runner.max_model_len, runner.page_size, runner.num_pages) == (100, 32, 16 * 4)
    assert (runner.device, runner.dtype, runner.model_config.vocab_size) == ("cpu", "bfloat16", 320)


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"max_model_len": 1000}, "max_model_len"),
        ({"kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        load(write_tiny_llama(tmp_path), **settings)
    assert caught.value.param == param


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="CUDA"):
        load(write_tiny_llama(tmp_path), device="cuda")


def test_a_float16_checkpoint_runs_in_bfloat16_on_a_cpu(tmp_path: Path) -> None:
    assert load(write_tiny_llama(tmp_path, dtype="float16"), device="cpu").dtype == "bfloat16"


def test_pages_follow_memory_and_are_never_more_than_usable(tmp_path: Path) -> None:
    config = Checkpoint.open(str(write_tiny_llama(tmp_path))).config
    sizes: dict[str, Any] = {
        "page_size": 16,
        "storage": torch.float32,
        "device": "cpu",
        "max_num_batched_tokens": 100,
    }
    page_bytes = 16 * 2 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, dim, bytes
    for memory, pages in ((10 * page_bytes, 10), (11 * page_bytes - 1, 10), (10**9, 3 * 7), (None, 3 * 7)):
        found = fitting_pages(config, max_num_seqs=3, max_model_len=100, memory_bytes=memory, **sizes)
        assert found == pages


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_tokens_of_the_cpu(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    prompts, sampling = work(6)
    assert rollout(load(folder, device="cuda"), prompts, sampling) == rollout(
        load(folder, device="cpu"), prompts, sampling
    )
