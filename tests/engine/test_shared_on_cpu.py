"""Prefixes that a CPU reads once for all rows: it does so in ordinary steps, and no token or logprob changes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, Row
from engine.request import Completion, Request, RequestId
from engine.runner import ModelRunner, load_decoder
from engine.sampling_params import SamplingParams
from engine.step_input import StepInput
from kernels import Kernels, SharedPrefixes, Sharing, kernels_for
from kernels.blocks import BlockParts, FusedBlocks
from tests.support.pressure import run
from tests.support.rollout import sequence
from tests.support.tiny import write_tiny_llama

PAGE = 16
PREFIX = 600  # tokens: two blocks of 256 and a part of one
CPU = kernels_for("cpu", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"), num_layers=2, max_position=1024)


def requests() -> list[Request]:
    """Two templates, four samples of one prompt, and some that share nothing."""
    rng = random.Random(7)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 300) for _ in range(count))

    prompts = [
        template + tokens(rng.randrange(1, 40))
        for template in (tokens(PREFIX), tokens(290))
        for _ in range(5)
    ]
    prompts += [tokens(length) for length in (5, 300)]
    samplings: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "logprobs": 2}]
    made = [
        Request(
            id=RequestId(f"{i}", 1),
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                seed=i, max_tokens=rng.randrange(5, 30), ignore_eos=True, **samplings[i % 2]
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    many = SamplingParams(seed=9, max_tokens=12, ignore_eos=True, temperature=1.0, n=4)
    return [*made, Request(id=RequestId("many", 1), prompt_token_ids=tokens(270), sampling=many)]


def watched(kernels: Kernels, seen: Counter[int]) -> Kernels:
    """A copy that counts how often so many rows are said to share a prefix."""

    def paged_attention(*args: Any) -> Tensor:
        shared: SharedPrefixes | None = args[6]
        seen[0 if shared is None else int((shared.tokens > 0).sum())] += 1
        return kernels.paged_attention(*args)

    def fuse(blocks: Sequence[BlockParts]) -> FusedBlocks:
        assert kernels.fuse is not None
        operation = kernels.fuse(blocks)

        def counted(*args: Any) -> tuple[Tensor, Tensor]:
            shared: SharedPrefixes | None = args[7]
            seen[0 if shared is None else int((shared.tokens > 0).sum())] += 1
            return operation(*args)

        return counted

    return replace(kernels, paged_attention=paged_attention, fuse=fuse)


def answers(model: Path, kernels: Kernels, **settings: Any) -> dict[RequestId, Completion]:
    config = EngineConfig(model=str(model), device="cpu", page_size=PAGE, max_num_seqs=20, **settings)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]
    with torch.inference_mode():
        decoder = load_decoder(Checkpoint.open(str(model)), kernels, dtype=dtype, device="cpu")
    return run(Engine(ModelRunner.over(decoder, config), None, config), requests())


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float32", "kv_cache_dtype": "int8"},
        {"dtype": "bfloat16", "num_scheduler_steps": 4},
        {"dtype": "bfloat16", "max_num_batched_tokens": 64},
    ],
    ids=["bf16", "fp32 on int8", "several steps", "short steps"],
)
def test_tokens_and_logprobs_are_the_same(model: Path, settings: dict[str, Any]) -> None:
    seen: Counter[int] = Counter()
    shared = answers(model, watched(CPU, seen), **settings)
    assert max(seen) >= 10
    assert seen[0]
    seen.clear()
    assert answers(model, watched(replace(CPU, sharing=None), seen), **settings) == shared
    assert set(seen) == {0}


def test_kernels_whose_rounding_would_depend_on_it_are_not_told(model: Path) -> None:
    seen: Counter[int] = Counter()
    inexact = replace(watched(CPU, seen), sharing=Sharing(least_tokens=256, least_rows=2, exact=False))
    answers(model, inexact, dtype="bfloat16")
    assert set(seen) == {0}


def test_what_attention_is_told() -> None:
    """Of rows of one token alone, however many tokens the others have."""
    pages, rows = list(range(40)), []
    for i, (own, count) in enumerate([(1, 1), (5, 5), (3, 1), (2, 1)]):
        one = sequence(list(range(3, 403)), SamplingParams(seed=1, max_tokens=9), i)
        one.num_computed = 400 - count
        one.pages = [*(pages[:20] if i < 3 else pages[20:]), *range(100 * own, 100 * own + 5)]
        rows.append(Row(one, count))
    shared = StepInput.build(Plan(tuple(rows)), PAGE, sharing=CPU.sharing).shared
    assert shared is not None
    assert shared.tokens.tolist() == [320, 0, 320, 0]
    assert shared.members.tolist() == [0, 2]
    assert shared.starts.tolist() == [0, 2]
    assert all(part.dtype == torch.int32 for part in (shared.tokens, shared.members, shared.starts))
    assert StepInput.build(Plan(tuple(rows[1:])), PAGE, sharing=CPU.sharing).shared is None
    assert StepInput.build(Plan(tuple(rows)), PAGE).shared is None
