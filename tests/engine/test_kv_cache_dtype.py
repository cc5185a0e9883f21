"""A cache of 8 bits in a whole model: the same promises, nearly the same tokens, and settings that say no."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runner import ModelRunner
from engine.sampling_params import InvalidParameter, SamplingParams
from tests.engine.test_model import all_logits
from tests.engine.test_runner import assert_neither_crowd_nor_chunk_matters, load, work
from tests.support.rollout import page_order, plan_for, sequence
from tests.support.tiny import write_tiny_llama

GREEDY = SamplingParams(temperature=0.0, seed=0, max_tokens=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_depend_on_neither_crowd_nor_chunk(tmp_path: Path, dtype: str) -> None:
    runner = load(write_tiny_llama(tmp_path), dtype=dtype, kv_cache_dtype="int8")
    assert (runner.deterministic, runner.kernels_name, runner.kv_cache_dtype) == (True, "cpu", "int8")
    assert_neither_crowd_nor_chunk_matters(runner)


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("head_dim", [16, 40])
def test_both_sets_give_the_same_logits(tmp_path: Path, head_dim: int) -> None:
    """In fp32 the sets differ in the order of sums. Where that moves an x / scale over the middle between two
    steps, one stored value is a step of 1/127 of its vector's largest apart: hence more than rounding."""
    folder = write_tiny_llama(tmp_path, head_dim=head_dim)
    fast, slow = (
        all_logits(load(folder, kernels=name, kv_cache_dtype="int8"), prompt_of(150), 30)
        for name in ("cpu", "reference")
    )
    difference = (fast - slow).abs()
    assert difference.max() < 0.01 * slow.std()
    assert difference.mean() < 0.0005 * slow.std()


def agreement(one: ModelRunner, other: ModelRunner, prompts: list[list[int]], steps: int) -> float:
    """Share of positions at which both choose the same token, while both read the tokens of `one`."""
    equal = 0
    for prompt in prompts:
        tokens = list(prompt)
        states = [(one, page_order(one), []), (other, page_order(other), [])]
        for _ in range(steps):
            chosen = []
            for runner, free, pages in states:
                item = sequence(tokens, GREEDY)
                item.num_computed, item.pages = (len(tokens) - 1 if pages else 0), pages
                chosen.append(int(runner.logits(plan_for(runner, [item], free, 10**9))[0].argmax()))
            equal += chosen[0] == chosen[1]
            tokens.append(chosen[0])
    return equal / (len(prompts) * steps)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, 0.95),
        ({"dtype": "bfloat16", "kv_cache_dtype": "int8"}, 0.9),
        ({"dtype": "float32", "kv_cache_dtype": "int8", "kernels": "reference"}, 0.95),
        ({"dtype": "float32", "kv_cache_dtype": "fp8", "kernels": "reference"}, 0.85),
    ],
)
def test_greedy_tokens_mostly_agree_with_those_of_a_plain_cache(
    tmp_path: Path, settings: dict[str, Any], least: float
) -> None:
    folder = write_tiny_llama(tmp_path)
    eight = load(folder, **settings)
    assert eight.kv_cache_dtype == settings["kv_cache_dtype"]
    plain = load(folder, **{**settings, "kv_cache_dtype": "auto"})
    assert plain.kv_cache_dtype == settings["dtype"]
    prompts = work(8)[0]
    found = agreement(plain, eight, prompts, 16)
    assert least <= found, found
    prompt = prompt_of(120)
    difference = (all_logits(plain, prompt, 20) - all_logits(eight, prompt, 20)).abs().mean()
    assert difference > 0, "nothing was quantised"


def test_what_a_set_cannot_store_is_said_with_what_it_can(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    with pytest.raises(InvalidParameter, match=r"allowed here: auto, int8$") as caught:
        load(folder, kv_cache_dtype="fp8", device="cpu")
    assert caught.value.param == "kv_cache_dtype"


def test_host_pages_are_there_when_asked_for(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    runner = load(folder, device="cpu")
    assert (runner.num_host_pages, runner.seconds_per_page_moved) == (0, None)
    space = 10 * runner.cache.page_bytes
    runner = load(folder, device="cpu", kv_cache_dtype="int8", swap_space_bytes=space)
    assert runner.num_host_pages == space // runner.cache.page_bytes > 10
    assert runner.seconds_per_page_moved is not None
    runner = load(folder, device="cpu", preemption_mode="recompute", swap_space_bytes=10**7)
    assert runner.num_host_pages == 0
    with pytest.raises(InvalidParameter, match="hold no page to swap") as caught:
        load(folder, device="cpu", preemption_mode="swap")
    assert caught.value.param == "swap_space_bytes"
