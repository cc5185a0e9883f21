"""Guessed tokens change how many steps an answer takes, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.memory import bytes_per_page
from engine.plan import Draws, Row
from engine.request import Completion, Request, RequestId
from engine.runner import ModelRunner
from engine.sampling_params import InvalidParameter, RepetitionDetectionParams, SamplingParams
from engine.sequence import Sequence
from engine.speculation import ON_CPU, STEP_TOKENS, Speculation, accept, num_speculative_tokens
from engine.tokenizer import Tokenizer
from kernels import kernels_for
from tests.support.checked import checked_engine, expected
from tests.support.pressure import run, run_arriving
from tests.support.tiny import write_tiny_llama

VOCAB_SIZE = 5  # of draws that are often what an n-gram says


def request(name: str, max_tokens: int, **sampling: Any) -> Request:
    asked = SamplingParams(**{"temperature": 0.0, "seed": 1, "max_tokens": max_tokens, **sampling})
    return Request(id=RequestId(name, 1), prompt_token_ids=tuple(map(ord, name)), sampling=asked)


def decoding(name: str, max_tokens: int = 50, **sampling: Any) -> Sequence:
    """One whose prompt, which ends as it begins, is computed."""
    made = Sequence(request(f"{name} 0123456789 {name}", max_tokens, **sampling), 0, max_tokens)
    made.token_ids.append(ord(" "))
    made.num_computed = made.num_prompt
    return made


# --- which rows, how many tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "may"),
    [
        ({}, True),
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, True),
        ({"stop": ("x",), "stop_token_ids": (3,), "min_tokens": 1}, True),
        ({"min_tokens": 2}, False),
        ({"logprobs": 0}, False),
        ({"presence_penalty": 0.1}, False),
        ({"logit_bias": {4: 1.0}}, False),
    ],
)
def test_who_may(sampling: dict[str, Any], may: bool) -> None:
    one = decoding("abc", **sampling)
    assert bool(Speculation(4, lambda *_: True).propose({one: 1}, 100)) is may


def test_only_few_rows_that_all_decode_and_only_what_there_is_room_for() -> None:
    speculation = Speculation(7, lambda *_: True)

    def proposed(count: int, budget: int = 100) -> list[int]:
        rows = {decoding(f"number {number}"): 1 for number in range(count)}
        return [len(tokens) for tokens in speculation.propose(rows, budget).values()]

    assert proposed(1) == [4]
    assert proposed(4) == [3, 3, 3, 3]
    assert sum(proposed(5)) == STEP_TOKENS - 5
    assert proposed(8) == [1] * 8
    assert proposed(9) == []
    assert proposed(0) == []
    assert sum(proposed(4, budget=3)) == 3
    assert proposed(4, budget=0) == []
    chunk = decoding("a chunk")
    chunk.num_computed = 3
    assert speculation.propose({decoding("abc"): 1, chunk: 5}, 100) == {}


def test_no_further_than_the_length_and_the_pages() -> None:
    asked: list[int] = []

    def reserve(sequence: Sequence, num_tokens: int) -> bool:
        asked.append(num_tokens - len(sequence.token_ids))
        return False

    assert Speculation(7, reserve).propose({decoding("abc"): 1}, 100) == {}
    assert asked == [4]
    free = Speculation(7, lambda *_: True)
    assert [len(t) for t in free.propose({decoding("abc", max_tokens=4): 1}, 100).values()] == [2]
    assert free.propose({decoding("abc", max_tokens=2): 1}, 100) == {}  # one is left, and is drawn anyway
    assert Speculation(0, reserve).propose({decoding("abc"): 1}, 100) == {}


def test_what_counts_of_the_draws() -> None:
    one = decoding("abc")
    rows = [Row(one, 1, (5, 6, 7)), Row(one, 1), Row(one, 1, (8, 9)), Row(one, 1, (4,))]
    drawn = [5, 6, 0, 1, 2, 3, 9, 1, 4, -1]
    told = accept(rows, Draws(drawn, {4: "of the second row"}))  # type: ignore[dict-item]
    assert told.token_ids == [5, 2, 3, 4]
    assert told.further == ([6, 0], [], [], [-1])
    assert told.logprobs == {1: "of the second row"}


# --- without torch --------------------------------------------------------------------------------------------


def test_fewer_steps_and_the_same_tokens() -> None:
    requests = [request(f"number {number}", 60 + number, ignore_eos=True) for number in range(4)]
    engine = checked_engine(200, max_num_seqs=6, speculative_tokens=7, vocab_size=4)  # nearly always the same
    done = run(engine, requests, poison=False)
    for one in requests:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, one.sampling.max_tokens or 0, 4)
    stats = engine.stats()
    assert 0 < stats["num_accepted_tokens"] < stats["num_draft_tokens"]
    assert stats["num_steps"] < 60
    assert stats["num_generated_tokens"] == sum(60 + number for number in range(4))


def test_too_few_pages_make_it_slower_not_wrong() -> None:
    asked = {"ignore_eos": True, "stop_token_ids": (1,)}  # which is never drawn, but who could know
    requests = [request(f"number {number}", 60, **asked) for number in range(8)]
    engine = checked_engine(60, max_num_seqs=8, speculative_tokens=7, vocab_size=VOCAB_SIZE)
    done = run(engine, requests, preempting=True, poison=False)
    assert engine.stats()["num_preemptions"] > 0
    assert engine.stats()["num_accepted_tokens"] > 0
    for one in requests:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 60, VOCAB_SIZE)


# --- with a model ---------------------------------------------------------------------------------------------

# A model of so few tokens falls into loops when it is cold, and says all pairs of them when it is hot.
NUM_TOKENS, PROMPT = 12, tuple(3 + i * i % 5 for i in range(40))
REPETITION = RepetitionDetectionParams(min_pattern_size=2, max_pattern_size=8, min_count=3)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 1.0, "ignore_eos": True},
    {"temperature": 0.5},
    {"temperature": 1.0, "n": 2, "top_p": 0.5, "ignore_eos": True},
    {"temperature": 1.0, "top_k": 2, "min_p": 0.05, "stop_token_ids": (10,), "min_tokens": 20},
    {"temperature": 0.3, "min_tokens": 12},
    {"temperature": 0.7, "stop": ("$%", "'"), "ignore_eos": True},
    {"temperature": 0.4, "stop": ("(", "&#"), "include_stop_str_in_output": True, "min_tokens": 5},
    {"temperature": 0.0, "repetition_detection": REPETITION, "ignore_eos": True},
)
LOOKED_AT: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 2, "ignore_eos": True},
    {"temperature": 1.0, "presence_penalty": 0.5},
    {"temperature": 0.0, "prompt_logprobs": 1, "ignore_eos": True},
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of few tokens, and one whose tokenizer is taken for it."""
    few = write_tiny_llama(tmp_path_factory.mktemp("few"), vocab_size=NUM_TOKENS)
    return few, write_tiny_llama(tmp_path_factory.mktemp("many"))


def load(
    models: tuple[Path, Path], dtype: str, num_speculative_tokens: int | None, **settings: Any
) -> Engine:
    config = EngineConfig(
        model=str(models[0]),
        dtype=dtype,  # type: ignore[arg-type]
        device="cpu",
        threads=1,
        max_model_len=256,
        num_speculative_tokens=num_speculative_tokens,
        **settings,
    )
    few, many = map(Checkpoint.open, map(str, models))
    return Engine(ModelRunner.load(config, few), Tokenizer.open(many), config)


def jobs(kinds: tuple[dict[str, Any], ...], max_tokens: int = 60) -> list[Request]:
    made = [
        request(f"job {number}", max_tokens + number, seed=number, **kind)
        for number, kind in enumerate(kinds)
    ]
    return [replace(one, prompt_token_ids=(3 + number % 9, *PROMPT)) for number, one in enumerate(made)]


def comparable(done: dict[RequestId, Completion]) -> dict[RequestId, Completion]:
    """How much of a prompt was known already depends on who ran before."""
    return {key: replace(completion, num_cached_tokens=0) for key, completion in done.items()}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_the_tokens_of_one_at_a_time(models: tuple[Path, Path], dtype: str) -> None:
    """All at once without guesses; alone, and a few at a time, with them."""
    requests = jobs(KINDS)
    plain = load(models, dtype, 0)
    wanted = comparable(run(plain, requests))
    assert plain.stats()["num_draft_tokens"] == 0
    reasons = {output.finish_reason for one in wanted.values() for output in one.outputs}
    assert reasons == {"stop", "length", "repetition"}
    for size in (1, 3):
        guessing = load(models, dtype, 7)
        for start in range(0, len(requests), size):
            group = requests[start : start + size]
            assert comparable(run(guessing, group)) == {one.id: wanted[one.id] for one in group}
        stats = guessing.stats()
        assert 30 < stats["num_accepted_tokens"] < stats["num_draft_tokens"] < stats["num_computed_tokens"]
        assert stats["num_generated_tokens"] == plain.stats()["num_generated_tokens"]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_beside_rows_that_are_looked_at_and_preempted(models: tuple[Path, Path], kv_cache_dtype: str) -> None:
    requests = jobs((*KINDS[:5], *LOOKED_AT))
    plain = load(models, "float32", 0, kv_cache_dtype=kv_cache_dtype)
    storage = torch.int8 if kv_cache_dtype == "int8" else torch.float32
    page_bytes = bytes_per_page(plain.runner.model_config, 16, storage)
    guessing = load(
        models,
        "float32",
        15,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=5,
        kv_cache_memory_bytes=24 * page_bytes,
    )
    assert comparable(run_arriving(guessing, requests, seed=4)) == comparable(run(plain, requests))
    assert guessing.stats()["num_preemptions"] > 0
    assert guessing.stats()["num_accepted_tokens"] > 0


def test_pages_filled_on_guesses_are_as_good_as_others(models: tuple[Path, Path]) -> None:
    """A second request goes on from what the first one said, out of the cache."""
    first = jobs(KINDS[:2])
    plain, guessing = load(models, "bfloat16", 0, enable_prefix_caching=False), load(models, "bfloat16", 7)
    said = run(guessing, first)
    assert guessing.stats()["num_accepted_tokens"] > 0
    longer = [
        replace(
            one,
            id=RequestId(one.id.job_id, 2),
            prompt_token_ids=(*one.prompt_token_ids, *said[one.id].outputs[0].token_ids),
            sampling=replace(one.sampling, logprobs=3),
        )
        for one in first
    ]
    done = run(guessing, longer)
    assert any(one.num_cached_tokens > len(PROMPT) + 32 for one in done.values())
    assert comparable(done) == comparable(run(plain, longer))


def test_where_it_is_on(models: tuple[Path, Path]) -> None:
    def number(num_speculative_tokens: int | None, **settings: Any) -> tuple[int, int]:
        runner = load(models, "float32", num_speculative_tokens, **settings).runner
        return runner.num_speculative_tokens, runner.num_scheduler_steps

    assert number(None) == (ON_CPU, 1)
    assert number(0) == (0, 1)
    assert number(3) == (3, 1)
    assert number(None, num_scheduler_steps=4) == (0, 4)
    # the library's fp32 products are not padded then, and own ones need no padding
    own = torch.float32 in kernels_for("cpu").multiplies
    assert number(None, deterministic=False) == (ON_CPU if own else 0, 1)
    assert number(3, deterministic=False) == (3, 1)
    config = EngineConfig(model="x")
    assert num_speculative_tokens(config, num_scheduler_steps=1, cheap=False) == 0


@pytest.mark.parametrize("settings", [{}, {"num_scheduler_steps": 2}])
def test_what_cannot_be_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InvalidParameter, match="num_speculative_tokens"):
        EngineConfig(model="x", num_speculative_tokens=1 if settings else -1, **settings)
