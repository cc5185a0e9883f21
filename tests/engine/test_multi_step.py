"""Several steps of decoding in one plan: the same tokens and endings as step by step, only with fewer plans."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.multi_step import decodes_freely, steps_together
from engine.plan import FAILED, Draws, Row
from engine.request import Completion, Request, RequestId, TokenLogprobs
from engine.runner import ModelRunner, load_decoder
from engine.sampling_params import InvalidParameter, RepetitionDetectionParams, SamplingParams
from engine.sequence import Sequence
from kernels.reference import KERNELS as REFERENCE
from tests.engine.test_scheduler import scheduler, sequence
from tests.support.checked import EOS, checked_engine, draw, expected, fingerprints
from tests.support.pressure import run
from tests.support.tiny import write_tiny_llama

INF = float("inf")


def decoding(max_tokens: int, **sampling: Any) -> Sequence:
    """One whose prompt is computed."""
    asked = SamplingParams(**{"temperature": 0.0, "seed": 1, "max_tokens": max_tokens, **sampling})
    made = Sequence(Request(id=RequestId("a", 1), prompt_token_ids=(5, 6, 7), sampling=asked), 0, max_tokens)
    made.token_ids.append(9)
    made.num_computed = 3
    return made


@pytest.mark.parametrize(
    ("sampling", "free"),
    [
        ({}, True),
        ({"temperature": 1.0}, True),
        ({"stop_token_ids": (3,)}, True),
        ({"min_tokens": 1}, True),
        ({"min_tokens": 2}, False),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, True),
        ({"logprobs": 0}, True),
        ({"logprobs": 1}, False),
        ({"presence_penalty": 0.1}, True),
        ({"repetition_penalty": 1.1, "frequency_penalty": 0.1, "logprobs": 0}, True),
        ({"presence_penalty": 0.1, "allowed_token_ids": (4, 5)}, False),
        ({"presence_penalty": 0.1, "logit_bias": {4: 1.0}}, False),
        ({"logit_bias": {4: 1.0}}, False),
    ],
)
def test_who_decodes_freely(sampling: dict[str, Any], free: bool) -> None:
    one = decoding(10, **sampling)
    assert decodes_freely(one) is free
    assert steps_together({one: 1, decoding(50): 1}, 8) == (8 if free else 1)


@pytest.mark.parametrize("steps", [1, 8])
def test_a_plan_that_finds_no_memory_is_made_anew(tmp_path: Path, steps: int) -> None:
    """In the middle of its steps, and while another one runs."""
    folder, asked = write_tiny_llama(tmp_path), [request(str(number), 20) for number in range(80)]
    config = EngineConfig(model=str(folder), device="cpu", num_scheduler_steps=steps, max_num_seqs=80)
    calls = count(1)

    def narrow(logits: Tensor, *rest: Any) -> Tensor:
        if next(calls) in (5, 15):
            raise torch.OutOfMemoryError("none is left\nmore words")
        return REFERENCE.sample(logits, *rest)

    found = []
    for kernels in (REFERENCE, replace(REFERENCE, sample=narrow)):
        with torch.inference_mode():
            decoder = load_decoder(Checkpoint.open(str(folder)), kernels, dtype=torch.float32, device="cpu")
        engine = Engine(ModelRunner.over(decoder, config), None, config)
        found.append({name: one.outputs for name, one in run(engine, asked, poison=False).items()})
    assert found[0] == found[1]
    assert next(calls) > 15


def test_known_ends_make_it_shorter() -> None:
    assert steps_together({decoding(100): 1}, 16) == 16
    assert steps_together({decoding(9): 1}, 16) == 8  # 8 are left
    assert steps_together({decoding(2): 1}, 16) == 1
    many = {decoding(100): 1 for _ in range(63)}
    assert steps_together({**many, decoding(2): 1}, 16) == 16  # 15 of 1,024 are wasted
    assert steps_together({**many, **{decoding(2): 1 for _ in range(6)}}, 16) == 2
    assert steps_together({decoding(100): 1}, 1) == 1
    chunk = decoding(100)
    chunk.num_computed = 1
    assert steps_together({chunk: 2, decoding(100): 1}, 16) == 1


def request(name: str, max_tokens: int, **sampling: Any) -> Request:
    asked = SamplingParams(**{"temperature": 0.0, "seed": 1, "max_tokens": max_tokens, **sampling})
    return Request(id=RequestId(name, 1), prompt_token_ids=tuple(map(ord, name)), sampling=asked)


def test_fewer_plans_and_the_same_tokens() -> None:
    requests = [request(f"number {number}", 40 + number, ignore_eos=True) for number in range(6)]
    engine = checked_engine(200, max_num_seqs=6, steps=8)
    done = run(engine, requests, poison=False)
    for one in requests:
        (output,) = done[one.id].outputs
        assert output.token_ids == expected(one, 0, one.sampling.max_tokens or 0)
        assert output.finish_reason == "length"
    stats = engine.stats()
    assert stats["num_steps"] < 15
    assert stats["num_generated_tokens"] == sum(len(done[one.id].outputs[0].token_ids) for one in requests)


def test_what_is_drawn_behind_an_end_is_dropped() -> None:
    """End of sequence and stop tokens within a run of steps."""
    requests = [request(f"number {number}", 64) for number in range(20)]
    stopped = [replace(one, id=RequestId(one.id.job_id, 2)) for one in requests]
    last = {one.id: expected(one, 0, 64)[-1] for one in requests}
    assert list(last.values()).count(EOS) > 10
    stops = []
    for one in stopped:
        known = list(one.prompt_token_ids)
        for _ in range(3):
            known.append(draw(fingerprints("", known, [])[-1], 0))
        stops.append(replace(one, sampling=replace(one.sampling, stop_token_ids=(known[-1],))))
    engine = checked_engine(400, max_num_seqs=40, steps=16)
    done = run(engine, [*requests, *stops], poison=False)
    for one in requests:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 64)
    for one in stops:
        (output,) = done[one.id].outputs
        wanted = expected(one, 0, 64)
        stop = one.sampling.stop_token_ids[0]
        end = wanted.index(stop) + 1 if stop in wanted else len(wanted)
        assert output.token_ids == wanted[:end]
        assert output.finish_reason == "stop"


def test_too_few_pages_make_it_shorter_not_wrong() -> None:
    asked = {"ignore_eos": True, "stop_token_ids": (1,)}  # which is never drawn, but who could know
    requests = [request(f"number {number}", 60, **asked) for number in range(8)]
    engine = checked_engine(60, max_num_seqs=8, steps=16)
    done = run(engine, requests, preempting=True, poison=False)
    assert engine.stats()["num_preemptions"] > 0
    for one in requests:
        assert done[one.id].outputs[0].token_ids == expected(one, 0, 60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.6, "stop": ("e", "st")},
    {"temperature": 1.3, "top_p": 0.9, "n": 2},
    {"temperature": 0.9, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.0, "top_k": 3, "logprobs": 0},
    {"temperature": 1.2, "logprobs": 0, "n": 2, "stop": ("r",)},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 0.9, "presence_penalty": 1.5, "frequency_penalty": -0.7, "n": 2, "logprobs": 0},
    {"temperature": 0.8, "frequency_penalty": 1.8, "top_p": 0.9, "repetition_penalty": 0.8},
    {"temperature": 1.5, "stop": ("a",), "include_stop_str_in_output": True, "min_tokens": 5},
    {
        "temperature": 1.2,
        "repetition_detection": RepetitionDetectionParams(
            min_pattern_size=1, max_pattern_size=4, min_count=2
        ),
    },
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_tokens_of_one_step_at_a_time(model: Path, dtype: str, mixed: bool) -> None:
    """Alone among their kind, and beside rows that must be looked at after each token."""
    kinds = (*KINDS, {"temperature": 1.0, "top_p": 0.9, "logit_bias": {300: 2.0}}) if mixed else KINDS
    requests = [
        request(f"a night {number}", 30 + number, **{"seed": number, **kinds[number % len(kinds)]})
        for number in range(16)
    ]

    def answers(steps: int) -> tuple[dict[RequestId, Completion], int]:
        engine = Engine.load(
            EngineConfig(
                model=str(model),
                dtype=dtype,  # type: ignore[arg-type]
                device="cpu",
                threads=1,
                max_model_len=128,
                num_scheduler_steps=steps,
            )
        )
        return run(engine, requests), int(engine.stats()["num_steps"])

    one_by_one, plans = answers(1)
    together, fewer = answers(8)
    assert together == one_by_one
    assert any(output.finish_reason == "stop" for one in together.values() for output in one.outputs)
    assert fewer < plans or mixed  # which is together only when the one to be looked at has gone


def test_no_steps_at_all_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="num_scheduler_steps"):
        EngineConfig(model="x", num_scheduler_steps=0)


def test_what_several_steps_say_of_their_tokens() -> None:
    """By row: a token whose logprob is not finite fails, and what was drawn behind it is nobody's."""
    rows = tuple(
        Row(decoding(9, **asked), 1) for asked in ({"logprobs": 0}, {}, {"logprobs": 0}, {"logprobs": 0})
    )
    tokens = [[4, 5, 6], [7, 8, 9], [1, 2, 3], [-1, 2, 3]]
    values = [[-0.5, -1.0, -1.5], [-INF] * 3, [-2.0, -INF, -1.0], [float("nan")] * 3]
    found = Draws.of_steps(rows, tokens, values)
    assert found.token_ids == [4, 7, 1, FAILED]
    assert found.further == ([5, 6], [8, 9], [FAILED, 3], [2, 3])
    assert found.logprobs == {0: told(4, -0.5), 2: told(1, -2.0)}
    assert found.further_logprobs == {0: [told(5, -1.0), told(6, -1.5)], 2: []}
    fewer = found.only([1, 2])
    assert fewer == ([7, 1], {1: told(1, -2.0)}, {}, ([8, 9], [FAILED, 3]), {1: []})
    assert Draws.of_steps(rows[1:2], [[7, 8]], []) == ([7], {}, {}, ([8],), {})


def told(token_id: int, logprob: float) -> TokenLogprobs:
    return TokenLogprobs(token_id=token_id, logprob=logprob)


def test_numbers_that_are_not_finite_end_a_run_of_several_steps() -> None:
    """What came before them is taken, what came behind them is nobody's."""
    s, one = scheduler(), sequence("a", 3)
    s.add(one)
    assert s.settle(s.plan(), [7], further=([7, FAILED, 7],)) == [one]
    s.check()
    assert one.output is None
    assert one.generated == [7, 7]


def test_a_loop_inside_a_run_of_several_steps_is_seen_where_it_closes() -> None:
    rule = RepetitionDetectionParams(max_pattern_size=1, min_count=3)
    s, one = scheduler(), sequence("a", 3, max_tokens=9, repetition_detection=rule)
    s.add(one)
    assert s.settle(s.plan(), [7], further=([7, 7, 7],)) == [one]
    s.check()
    assert one.output is not None
    assert (one.output.token_ids, one.output.finish_reason) == ((7, 7, 7), "repetition")
