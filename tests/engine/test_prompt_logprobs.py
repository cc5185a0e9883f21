"""Logprobs of prompts: every position is scored once, whatever is in memory, whoever asks and whatever comes between;
in slices of bounded size; and what is not finite fails its own request.

That the values are those of transformers is in test_family_parity.py, that they are the same bits in any crowd in
test_alone_equals_crowd.py, in any history in test_any_history.py.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM
from engine import logprobs as logprobs_module
from engine.config import EngineConfig
from engine.engine import Engine
from engine.logprobs import score_prompts, slice_rows
from engine.model import Decoder, Hidden
from engine.plan import FAILED, Draws, Plan, Row
from engine.request import Completion, Generated, Rejected, Request, RequestId, TokenLogprobs
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from kernels.reference import normalisers
from tests.support.checked import CheckedRunner, checked_engine, expected_scores
from tests.support.pressure import run
from tests.support.rollout import sequence
from tests.support.tiny import VOCAB_SIZE, write_tiny_llama

NAN_TOKEN = 300


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, NAN_TOKEN) for _ in range(length))


def request(name: str, token_ids: tuple[int, ...], **asked: Any) -> Request:
    params = {"seed": 1, "max_tokens": 4, "ignore_eos": True, "prompt_logprobs": 0} | asked
    return Request(id=RequestId(name, 1), prompt_token_ids=token_ids, sampling=SamplingParams(**params))


def answers(engine: Engine, *requests: Request) -> dict[str, Completion]:
    return {key.job_id: one for key, one in run(engine, requests, poison=False).items()}


def scored(*engines: Engine) -> list[tuple[str, int]]:
    """(request, position) of everything that was scored, in order; always of the first sample."""
    found: list[tuple[str, int]] = []
    for engine in engines:
        assert isinstance(engine.runner, CheckedRunner)
        assert {sample for _, sample, _ in engine.runner.scored} <= {0}
        found += [(request_id.job_id, position) for request_id, _, position in engine.runner.scored]
    return found


def once(name: str, num_tokens: int) -> list[tuple[str, int]]:
    return [(name, position) for position in range(num_tokens - 1)]


# --- who scores what ----------------------------------------------------------------------------------------


def test_a_warm_cache_is_not_read_but_still_filled() -> None:
    engine = checked_engine(100, max_num_batched_tokens=16)
    quiet, asks = request("quiet", prompt(41), prompt_logprobs=None), request("asks", prompt(41))
    answers(engine, quiet)
    first = answers(engine, asks)["asks"]
    assert (first.num_cached_tokens, first.prompt_logprobs) == (0, expected_scores(asks))
    again = answers(engine, replace(quiet, id=RequestId("again", 1)))["again"]
    assert (again.num_cached_tokens, again.prompt_logprobs) == (40, None)
    cold = checked_engine(100)
    answers(cold, asks)
    assert answers(cold, quiet)["quiet"].num_cached_tokens == 40
    assert scored(engine) == scored(cold) == once("asks", 41)


def test_nobody_waits_for_a_prefix_that_must_be_computed_anyway() -> None:
    engine = checked_engine(100, max_num_batched_tokens=64)
    leader = request("leader", prompt(41), prompt_logprobs=None, seed=2)
    asks, quiet = request("asks", prompt(41)), request("quiet", prompt(41), prompt_logprobs=None)
    for one in (leader, asks, quiet):
        engine.add(one)
    engine.step()
    assert scored(engine) == once("asks", 64 - 41 + 1)  # side by side with the leader
    done = answers(engine)
    assert [done[name].num_cached_tokens for name in ("leader", "asks", "quiet")] == [0, 0, 40]


def test_samples_and_twins_share_what_the_first_one_takes() -> None:
    engine = checked_engine(100)
    asked = {"n": 3, "temperature": 1.0}
    twins = [request(name, prompt(41), **asked) for name in "ab"]
    done = answers(engine, *twins)
    assert scored(engine) == once("a", 41)
    assert done["a"].prompt_logprobs == done["b"].prompt_logprobs == expected_scores(twins[0])
    # 41 for the first, and of each other sample the last of the prompt; then 3 tokens each
    assert engine.stats()["num_computed_tokens"] <= 41 + 2 * 4 + 3 * 3
    # one that asks for something else has a run of its own
    other = answers(engine, request("c", prompt(41), **asked, logprobs=0))["c"]
    assert other.prompt_logprobs == done["a"].prompt_logprobs
    assert Counter(name for name, _ in scored(engine)) == {"a": 40, "c": 40}


@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_preempted_prompt_keeps_what_was_taken(prefix_caching: bool, evicted: bool) -> None:
    engine = checked_engine(16, max_num_batched_tokens=8, enable_prefix_caching=prefix_caching)
    asks = request("a", prompt(41))
    engine.add(asks)
    for _ in range(3):
        engine.step()
    assert len(scored(engine)) == 24
    engine.scheduler.preempt(engine.scheduler.running[0])
    if evicted:
        engine.pool.free(engine.pool.allocate(16) or [])
    done = answers(engine)["a"]
    assert done.prompt_logprobs == expected_scores(asks)
    assert scored(engine) == once("a", 41)
    assert engine.stats()["num_recomputed_tokens"] == (24 if evicted else 0)


@pytest.mark.parametrize("num_steps", [1, 3, 6, 8])
def test_a_checkpoint_carries_what_was_taken(num_steps: int) -> None:
    """After 6 of these steps the prompt is known, after 8 there are tokens."""
    engine, other = (checked_engine(100, max_num_batched_tokens=7) for _ in range(2))
    asks = request("a", prompt(41), n=2, max_tokens=9)
    engine.add(asks)
    for _ in range(num_steps):
        engine.step()
    generated = engine.generated(asks.id)
    assert [len(one.prompt_logprobs) for one in generated] == [min(40, 7 * num_steps), 0]
    engine.abort(asks.id)
    done = answers(other, replace(asks, generated=generated))["a"]
    assert done.prompt_logprobs == expected_scores(asks)
    assert scored(engine, other) == once("a", 41)


def test_a_checkpoint_that_cannot_be_is_refused() -> None:
    one = TokenLogprobs(token_id=3, logprob=-1.0)
    asks, quiet = request("a", (3, 3, 3), n=2), request("a", (3, 3, 3), n=2, prompt_logprobs=None)
    nothing = Generated()
    bad = [
        (asks, (Generated(prompt_logprobs=(one,) * 3), nothing), "0 to 2 .* sample 0"),
        (asks, (Generated(token_ids=(5,), prompt_logprobs=(one,)), nothing), "2 to 2 .* sample 0"),
        (asks, (nothing, Generated(prompt_logprobs=(one,))), "0 to 0 .* sample 1"),
        (quiet, (Generated(prompt_logprobs=(one,)), nothing), "0 to 0 .* sample 0"),
    ]
    engine = checked_engine(20)
    for asked, generated, says in bad:
        with pytest.raises(Rejected, match=f"generated: {says}"):
            engine.add(replace(asked, generated=generated))
    assert not engine.has_work


def test_the_shortest_prompt_and_an_abort() -> None:
    engine = checked_engine(20, max_num_batched_tokens=2)
    assert answers(engine, request("a", (5,)))["a"].prompt_logprobs == (None,)
    engine.add(request("b", prompt(9)))
    engine.step()
    gone = engine.abort(RequestId("b", 1))
    assert gone is not None
    assert gone.prompt_logprobs is None
    engine.check()


# --- values -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), nan_token_id=NAN_TOKEN)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), kv_cache_memory_bytes=1 << 22, dtype="float32", threads=1)


def test_logits_exist_in_slices_and_slices_change_no_bit(
    llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(str(k), prompt(90 + k, k), prompt_logprobs=k, max_tokens=2) for k in range(4)]
    asked: list[int] = []
    logits = Decoder.logits

    def counted(decoder: Decoder, hidden: Hidden, rows: Tensor) -> Tensor:
        asked.append(len(rows))
        return logits(decoder, hidden, rows)

    monkeypatch.setattr(Decoder, "logits", counted)
    whole = answers(llm.engine, *requests)
    assert isinstance(llm.engine.runner, ModelRunner)
    multiple = llm.engine.runner._row_multiple
    assert -(-362 // multiple) * multiple in asked  # 89 + 90 + 91 + 92 positions, padded as steps are
    asked.clear()
    monkeypatch.setattr(logprobs_module, "SLICE_BYTES", 48 * 4 * VOCAB_SIZE)
    fresh = Engine.load(
        EngineConfig(model=str(folder), kv_cache_memory_bytes=1 << 22, dtype="float32", threads=1)
    )
    assert answers(fresh, *requests) == whole
    assert asked[:8] == [48] * 7 + [-(-26 // multiple) * multiple]
    assert max(asked) == 48


def test_a_slice_is_at_least_one_padded_row() -> None:
    assert slice_rows(128_256, 16) == 128
    assert slice_rows(128_256, 1) == 130
    assert slice_rows(320, 16) * 320 * 4 <= logprobs_module.SLICE_BYTES < (slice_rows(320, 16) + 16) * 320 * 4
    assert slice_rows(10**8, 16) == 16


def test_one_bad_row_fails_its_own_request_even_if_nothing_follows_from_it() -> None:
    """An infinite logit that no later token sees."""
    asked = {"seed": 0, "prompt_logprobs": 1}
    rows = (
        Row(sequence([4, 5, 6], SamplingParams(**asked)), 3),
        Row(sequence([7, 8, 9, 10], SamplingParams(**asked)), 3),
        Row(sequence([7, 8, 9], SamplingParams(seed=0)), 3),
        Row(sequence([7, 8], SamplingParams(**asked)), 2),
    )
    plan = Plan(rows)
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    clean = score_prompts(plan, torch.arange(6), lambda at: logits[at].clone(), 4, normalisers)
    assert list(clean) == [0, 1, 3]
    plain = logits.log_softmax(dim=1)
    for place, first in ((0, 0), (1, 2), (3, 5)):
        made, tokens = clean[place], rows[place].sequence.token_ids
        assert made is not None
        assert [one.token_id for one in made] == tokens[1:]
        values = [plain[first + i, token_id].item() for i, token_id in enumerate(tokens[1:])]
        assert [one.logprob for one in made] == values
    logits[0, 11], logits[3, 2] = float("inf"), float("nan")
    scores = score_prompts(plan, torch.arange(6), lambda at: logits[at].clone(), 4, normalisers)
    assert scores == {0: None, 1: None, 3: clean[3]}
    # the first would have drawn a token, the second is in the middle of its prompt
    assert Draws([3, 4, 5], {}).with_scores(plan, scores) == ([FAILED, 4, 5], {}, scores, (), {})


@pytest.mark.parametrize("chunk", [3, 512])
def test_nan_in_a_prompt_fails_it_at_once_and_spoils_none(folder: Path, chunk: int) -> None:
    good = request("good", prompt(30), prompt_logprobs=2)
    bad = request("bad", (*prompt(4), NAN_TOKEN, *prompt(25, 1)), n=2, temperature=1.0)
    engine = Engine.load(
        EngineConfig(
            model=str(folder),
            kv_cache_memory_bytes=1 << 20,
            dtype="float32",
            threads=1,
            max_num_batched_tokens=chunk,
        )
    )
    alone = answers(engine, good)["good"]
    engine.add(bad)
    steps, failed = 0, list[Completion]()
    while not failed:
        failed, steps = engine.step(), steps + 1
        engine.check()
    assert steps == min(2, -(-30 // chunk))  # with chunks of 3, in the one that holds the fifth token
    assert failed[0].error is not None
    assert failed[0].error.code == "numerics"
    assert (failed[0].outputs, failed[0].prompt_logprobs) == ((), None)
    assert not engine.has_work
    again = answers(engine, good, replace(bad, id=RequestId("again", 1)))
    assert again["good"] == alone
    assert again["again"].error is not None


def test_asking_changes_nothing_else_and_the_python_door_shows_them(llm: LLM) -> None:
    params = [SamplingParams(seed=1, max_tokens=6, prompt_logprobs=count) for count in (2, 0, None)]
    two, none, quiet = llm.generate(["the night press"] * 3, params, use_tqdm=False)
    assert two.outputs == none.outputs == quiet.outputs
    assert quiet.prompt_logprobs is None
    assert two.prompt_logprobs is not None
    assert none.prompt_logprobs is not None
    assert two.prompt_logprobs[0] is none.prompt_logprobs[0] is None
    pairs = list(zip(two.prompt_logprobs, none.prompt_logprobs, strict=True))[1:]
    assert len(pairs) == len(two.prompt_token_ids) - 1 > 3
    for token_id, (told, plain) in zip(two.prompt_token_ids[1:], pairs, strict=True):
        assert told is not None
        assert plain is not None
        assert (plain.token_id, plain.top) == (token_id, ())
        assert plain == replace(told, top=())
        assert len(told.top) == 2
