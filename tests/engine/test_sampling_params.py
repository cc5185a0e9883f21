"""SamplingParams: what is accepted, how it is kept, and that whatever is accepted can be run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Rejected, Request, RequestId
from engine.sampling_params import (
    InvalidParameter,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from tests.support import pressure
from tests.support.tiny import EOS_TOKEN_ID, VOCAB_SIZE, write_tiny_llama


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), num_layers=1, hidden_size=32)
    return Engine.load(
        EngineConfig(model=str(folder), threads=1, dtype="float32", kv_cache_memory_bytes=1 << 22)
    )


def run(engine: Engine, *sampling: SamplingParams) -> list[tuple[int, ...]]:
    """The first sample's tokens of each; nothing may fail."""
    requests = [
        Request(id=RequestId(str(number), 1), prompt_token_ids=(5 + number % 9, 6, 7), sampling=params)
        for number, params in enumerate(sampling)
    ]
    done = pressure.run(engine, requests, poison=False)
    assert [done[request.id].error for request in requests] == [None] * len(requests)
    return [done[request.id].outputs[0].token_ids for request in requests]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 101}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {1: 101}}, "logit_bias"),
        ({"logit_bias": {1: None}}, "logit_bias"),
        ({"logit_bias": {1: 1, "1": 2}}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 0)}, "logit_bias"),
        ({"logit_bias": 5}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [3]}, "bad_words"),
        ({"bad_words": 3}, "bad_words"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": 3}, "allowed_token_ids"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids"),
        ({"allowed_token_ids": range(5000)}, "allowed_token_ids"),
        ({"stop": 3}, "stop"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**fields)
    assert caught.value.param == param


def test_the_same_wish_is_kept_in_the_same_words() -> None:
    one = SamplingParams(logit_bias={"9": 1, 3: -2.5}, allowed_token_ids=[9, 3, 9], bad_words="x")  # type: ignore[dict-item, arg-type]
    other = SamplingParams(logit_bias=((3, -2.5), (9, 1.0)), allowed_token_ids=(3, 9), bad_words=("x",))
    assert one == other
    assert hash(one) == hash(other)
    assert one.biases == ((3, -2.5), (9, 1.0))


def test_the_smallest_nucleus_is_the_likeliest_token() -> None:
    """OpenAI allows it, vLLM does not."""
    assert SamplingParams(top_p=0, temperature=1.5, n=2) == SamplingParams(temperature=0.0, n=2)


def test_only_allowed_tokens_come(engine: Engine) -> None:
    params = SamplingParams(seed=1, max_tokens=60, allowed_token_ids=(9, 30, 31), temperature=2.0)
    assert set(run(engine, params)[0]) == {9, 30, 31}


def test_a_bias_of_a_hundred_decides(engine: Engine) -> None:
    up, down = (SamplingParams(seed=1, max_tokens=5, logit_bias={40: bias}) for bias in (100, -100))
    for_ever, never = run(engine, up, down)
    assert for_ever == (40,) * 5
    assert 40 not in never


def test_bad_words_do_not_come(engine: Engine) -> None:
    """A word of one token and one of two, where only three letters may be written."""
    assert engine.tokenizer is not None
    letters = [engine.tokenizer.encode_part(letter) for letter in "qzx"]
    assert engine.tokenizer.encode_part("qz") == letters[0] + letters[1]
    common: dict[str, Any] = {"seed": 4, "max_tokens": 200, "temperature": 2.0}
    common["allowed_token_ids"] = [token_id for ids in letters for token_id in ids]
    free, clean, last = run(
        engine,
        SamplingParams(**common, logit_bias=dict.fromkeys(common["allowed_token_ids"], 0.0)),
        SamplingParams(**common, bad_words=("qz", "x")),
        SamplingParams(**common, bad_words=("q", "z", "x")),
    )
    texts = [engine.tokenizer.decode(tokens) for tokens in (free, clean, last)]
    assert "qz" in texts[0]
    assert "x" in texts[0]
    assert set(texts[1]) == {"q", "z"}
    assert "qz" not in texts[1]
    assert len(last) == 200  # what forbids everything gives way


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"allowed_token_ids": (VOCAB_SIZE,)}, "allowed_token_ids"),
        ({"logit_bias": {VOCAB_SIZE: 1}}, "logit_bias"),
        ({"allowed_token_ids": (EOS_TOKEN_ID, 9), "stop_token_ids": (9,), "min_tokens": 1}, "min_tokens"),
    ],
)
def test_what_this_model_cannot_do_is_rejected(engine: Engine, fields: dict[str, Any], said: str) -> None:
    sampling = SamplingParams(seed=0, **fields)
    with pytest.raises(Rejected, match=said):
        engine.add(Request(id=RequestId("a", 1), prompt_token_ids=(5,), sampling=sampling))
    assert not engine.has_work


token_ids = st.integers(-1, VOCAB_SIZE + 2)
words = st.text("ae t\n.é😀", max_size=4)
fields = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(0, 3),
        "temperature": st.one_of(st.sampled_from([0, 1e-300, 2.0]), st.floats(0, 2)),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(-1, VOCAB_SIZE + 9),
        "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.one_of(st.floats(0.01, 100), st.just(1)),
        "logit_bias": st.dictionaries(token_ids, st.floats(-100, 100), max_size=5),
        "bad_words": st.lists(words, max_size=4),
        "allowed_token_ids": st.one_of(st.none(), st.lists(token_ids, max_size=4)),
        "min_tokens": st.integers(0, 5),
        "stop": st.lists(words, max_size=3),
        "stop_token_ids": st.lists(token_ids, max_size=4),
        "ignore_eos": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "repetition_detection": st.builds(
            RepetitionDetectionParams, max_pattern_size=st.integers(1, 9), min_count=st.integers(2, 5)
        ),
        "logprobs": st.one_of(st.none(), st.integers(0, 20)),
        "structured_outputs": st.one_of(
            st.none(),
            st.none(),
            st.builds(StructuredOutputsParams, regex=st.sampled_from(["[a-e ]{1,4}", "(at|é)*", "a?"])),
            st.builds(StructuredOutputsParams, choice=st.lists(st.sampled_from("ate "), min_size=1)),
            st.builds(StructuredOutputsParams, json=st.just('{"type": ["integer", "array"], "maxItems": 2}')),
        ),
        "seed": st.integers(-(2**63), 2**63 - 1),
    },
)


def run_whatever_is_accepted(engine: Engine, many: list[dict[str, Any]]) -> int:
    """How many were accepted; a refusal names a field that was given, and nothing else ever comes up."""
    accepted = []
    for given_fields in many:
        refused = ""
        try:
            params = SamplingParams(**{"seed": 0, "max_tokens": 5, **given_fields})
            engine.add(Request(id=RequestId("probe", 1), prompt_token_ids=(5,), sampling=params))
        except InvalidParameter as error:
            refused = error.param
        except Rejected as error:
            refused = error.message.split(":")[0]
        if refused:
            assert refused in given_fields
            continue
        engine.abort(RequestId("probe", 1))
        accepted.append(params)
    run(engine, *accepted)
    return len(accepted)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(many=st.lists(fields, min_size=20, max_size=20))
def test_whatever_is_accepted_runs(engine: Engine, many: list[dict[str, Any]]) -> None:
    run_whatever_is_accepted(engine, many)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ten_thousand_accepted_sets_run(engine: Engine) -> None:
    accepted = 0

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(many=st.lists(fields, min_size=30, max_size=30))
    def many_sets(many: list[dict[str, Any]]) -> None:
        nonlocal accepted
        if accepted < 10_000:
            accepted += run_whatever_is_accepted(engine, many)

    many_sets()
    assert accepted >= 10_000


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(n=3, stop="a", logit_bias={3: 1.0}, allowed_token_ids=[5, 2], seed=1, logprobs=2),
        SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "object"})),
    ],
)
def test_with_another_seed_all_else_stays(sampling: SamplingParams) -> None:
    before = replace(sampling)
    assert sampling.seeded(-7) == replace(sampling, seed=-7)
    assert sampling == before
    with pytest.raises(InvalidParameter, match=r"^seed"):
        sampling.seeded(2**63)
