"""Every field of a job, every way to get it wrong, and the name of the field in every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.sampling_params import MAX_SEED, RepetitionDetectionParams
from jobs.bad_field import NOT_SUPPORTED_YET, BadField
from jobs.body import JobBody, parse_job, parse_metadata
from jobs.settings import Settings

USER = {"role": "user", "content": "hi"}
SCHEMA = {"enum": [None, "é", {"default": None}], "const": None}  # nulls that mean something


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA} | fields}


# body, the field that is named, the code
HOSTILE: list[tuple[Any, str | None, str]] = [
    (None, None, "invalid_type"),
    (1, None, "invalid_type"),
    ([], None, "invalid_type"),
    ("prompt", None, "invalid_type"),
    ({}, "prompt", "invalid_value"),
    ({"prompt": None}, "prompt", "invalid_value"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": 1}, "prompt", "invalid_type"),
    ({"prompt": ["a", "b"]}, "prompt", "invalid_type"),
    ({"prompt": "a\ud800"}, "prompt", "invalid_value"),
    ({"prompt": "a", "messages": [USER]}, "prompt", "invalid_value"),
    ({"prompt": "x" * 1_001}, "prompt", "invalid_value"),
    ({"messages": [USER | {"content": "x" * 600}] * 2}, "messages", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": USER}, "messages", "invalid_type"),
    ({"messages": [USER, "hi"]}, "messages[1]", "invalid_type"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
        "messages[0].content",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content",
        "invalid_value",
    ),
    ({"messages": [USER | {"name": "bob"}]}, "messages[0].name", "unknown_parameter"),
    ({"messages": [USER | {"content": "\udfff"}]}, "messages[0].content", "invalid_value"),
    *(
        ({"messages": [USER], "chat_template_kwargs": given}, f"chat_template_kwargs{named}", code)
        for given, named, code in (
            ([], "", "invalid_type"),
            ("enable_thinking", "", "invalid_type"),
            ({"a b": 1}, "", "invalid_value"),
            ({"\ud800": 1}, "", "invalid_value"),
            ({"\x00": 1}, "", "invalid_value"),
            ({f"n{i}": 1 for i in range(17)}, "", "invalid_value"),
            ({"messages": 1}, ".messages", "invalid_value"),
            ({"ok": True, "bos_token": "a"}, ".bos_token", "invalid_value"),
            ({"effort": "<|end|>"}, ".effort", "invalid_value"),
            ({"effort": "\ud800"}, ".effort", "invalid_value"),
            ({"effort": ["high"]}, ".effort", "invalid_value"),
            ({"budget": 2**63}, ".budget", "invalid_value"),
            ({"budget": float("nan")}, ".budget", "invalid_value"),
        )
    ),
    ({"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "invalid_value"),
    ({"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs", "invalid_value"),
    ({"prompt": "a", "promt": "b"}, "promt", "unknown_parameter"),
    ({"promt": "b"}, "promt", "unknown_parameter"),
    ({"prompt": "a", "n": 0}, "n", "invalid_value"),
    ({"prompt": "a", "n": 17}, "n", "invalid_value"),
    ({"prompt": "a", "n": True}, "n", "invalid_type"),
    ({"prompt": "a", "n": "1"}, "n", "invalid_type"),
    ({"prompt": "a", "n": 1.5}, "n", "invalid_type"),
    ({"prompt": "a", "temperature": -0.1}, "temperature", "invalid_value"),
    ({"prompt": "a", "temperature": 2.1}, "temperature", "invalid_value"),
    ({"prompt": "a", "temperature": "1"}, "temperature", "invalid_type"),
    ({"prompt": "a", "temperature": False}, "temperature", "invalid_type"),
    ({"prompt": "a", "temperature": float("nan")}, "temperature", "invalid_value"),
    ({"prompt": "a", "temperature": float("inf")}, "temperature", "invalid_value"),
    ({"prompt": "a", "top_p": -0.01}, "top_p", "invalid_value"),
    ({"prompt": "a", "top_p": 1.01}, "top_p", "invalid_value"),
    ({"prompt": "a", "top_k": -2}, "top_k", "invalid_value"),
    ({"prompt": "a", "repetition_detection": True}, "repetition_detection", "invalid_type"),
    (
        {"prompt": "a", "repetition_detection": {}},
        "repetition_detection.max_pattern_size",
        "missing_required_parameter",
    ),
    (
        {"prompt": "a", "repetition_detection": {"max_pattern_size": 999}},
        "repetition_detection.max_pattern_size",
        "invalid_value",
    ),
    ({"prompt": "a", "response_format": "json"}, "response_format", "invalid_type"),
    ({"prompt": "a", "response_format": {}}, "response_format.type", "missing_required_parameter"),
    ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    (
        {"prompt": "a", "response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "invalid_value",
    ),
    (
        {"prompt": "a", "response_format": json_schema() | {"type": "text"}},
        "response_format.json_schema",
        "invalid_value",
    ),
    (
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "missing_required_parameter",
    ),
    (
        {"prompt": "a", "response_format": json_schema(name="a b")},
        "response_format.json_schema.name",
        "invalid_value",
    ),
    (
        {"prompt": "a", "response_format": json_schema(schema=[])},
        "response_format.json_schema.schema",
        "invalid_type",
    ),
    (
        {"prompt": "a", "response_format": json_schema(schema={"const": "\ud800"})},
        "response_format.json_schema.schema",
        "invalid_value",
    ),
    (
        {"prompt": "a", "response_format": json_schema(), "structured_outputs": {"regex": "a"}},
        "response_format",
        "invalid_value",
    ),
    ({"prompt": "a", "structured_outputs": {}}, "structured_outputs", "invalid_value"),
    (
        {"prompt": "a", "structured_outputs": {"regex": "a", "json_object": True}},
        "structured_outputs",
        "invalid_value",
    ),
    (
        {"prompt": "a", "structured_outputs": {"regexp": "a"}},
        "structured_outputs.regexp",
        "unknown_parameter",
    ),
    ({"prompt": "a", "structured_outputs": {"json": 5}}, "structured_outputs.json", "invalid_value"),
    (
        {"prompt": "a", "structured_outputs": {"choice": ["a", 1]}},
        "structured_outputs.choice[1]",
        "invalid_type",
    ),
    (
        {"prompt": "a", "structured_outputs": {"regex": "a"}, "ignore_eos": True},
        "ignore_eos",
        "invalid_value",
    ),
    ({"prompt": "a", "min_p": 1.5}, "min_p", "invalid_value"),
    ({"prompt": "a", "presence_penalty": "1"}, "presence_penalty", "invalid_type"),
    ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"prompt": "a", "logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({"prompt": "a", "logit_bias": {"1": "2"}}, "logit_bias.1", "invalid_type"),
    ({"prompt": "a", "logit_bias": {"one": 2}}, "logit_bias", "invalid_value"),
    ({"prompt": "a", "logit_bias": {"1": 200}}, "logit_bias", "invalid_value"),
    ({"prompt": "a", "bad_words": "damn"}, "bad_words", "invalid_type"),
    ({"prompt": "a", "bad_words": [""]}, "bad_words", "invalid_value"),
    ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids", "invalid_value"),
    ({"prompt": "a", "top_k": 10**9}, "top_k", "invalid_value"),
    ({"prompt": "a", "seed": MAX_SEED + 1}, "seed", "invalid_value"),
    ({"prompt": "a", "seed": -(10**300)}, "seed", "invalid_value"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"prompt": "a", "max_tokens": 10**10}, "max_tokens", "invalid_value"),
    ({"prompt": "a", "max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"prompt": "a", "max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "invalid_value"),
    ({"prompt": "a", "min_tokens": -1}, "min_tokens", "invalid_value"),
    ({"prompt": "a", "min_tokens": 3, "max_tokens": 2}, "min_tokens", "invalid_value"),
    ({"prompt": "a", "ignore_eos": 1}, "ignore_eos", "invalid_type"),
    ({"prompt": "a", "stop": 1}, "stop", "invalid_type"),
    ({"prompt": "a", "stop": ""}, "stop", "invalid_value"),
    ({"prompt": "a", "stop": ["a", None]}, "stop[1]", "invalid_type"),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", "invalid_value"),
    ({"prompt": "a", "stop": ["x" * 257]}, "stop", "invalid_value"),
    ({"prompt": "a", "stop": ["\ud800"]}, "stop[0]", "invalid_value"),
    ({"prompt": "a", "logprobs": 1}, "logprobs", "invalid_type"),
    ({"prompt": "a", "top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"prompt": "a", "top_logprobs": 2, "logprobs": False}, "top_logprobs", "invalid_value"),
    ({"prompt": "a", "logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"prompt": "a", "logprobs": True, "top_logprobs": -1}, "top_logprobs", "invalid_value"),
    ({"prompt": "a", "logprobs": True, "max_tokens": 100_001}, "logprobs", "invalid_value"),
    (
        {"prompt": "a", "logprobs": True, "top_logprobs": 20, "n": 16, "max_tokens": 298},
        "logprobs",
        "invalid_value",
    ),
    ({"prompt": "a", "stop_token_ids": 3}, "stop_token_ids", "invalid_type"),
    ({"prompt": "a", "stop_token_ids": [1, "2"]}, "stop_token_ids[1]", "invalid_type"),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", "invalid_value"),
    ({"prompt": "a", "stop_token_ids": [1] * 257}, "stop_token_ids", "invalid_value"),
    ({"prompt": "a", "model": ""}, "model", "invalid_value"),
    ({"prompt": "a", "model": 1}, "model", "invalid_type"),
    ({"prompt": "a", "model": "m\x00"}, "model", "invalid_value"),
    ({"prompt": "a", "model": "m" * 256}, "model", "invalid_value"),
    ({"prompt": "a", "custom_id": ""}, "custom_id", "invalid_value"),
    ({"prompt": "a", "custom_id": 7}, "custom_id", "invalid_type"),
    ({"prompt": "a", "custom_id": "c" * 513}, "custom_id", "invalid_value"),
    ({"prompt": "a", "custom_id": "a\x00b"}, "custom_id", "invalid_value"),
    ({"prompt": "a", "custom_id": "a\ud800"}, "custom_id", "invalid_value"),
    ({"prompt": "a", "metadata": []}, "metadata", "invalid_type"),
    ({"prompt": "a", "metadata": {"k": 1}}, "metadata.k", "invalid_type"),
    ({"prompt": "a", "metadata": {"": "v"}}, "metadata", "invalid_value"),
    ({"prompt": "a", "metadata": {"k" * 65: "v"}}, "metadata", "invalid_value"),
    ({"prompt": "a", "metadata": {"k": "v" * 513}}, "metadata", "invalid_value"),
    ({"prompt": "a", "metadata": {str(i): "v" for i in range(17)}}, "metadata", "invalid_value"),
]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, max_body_bytes=1_000, default_max_tokens=50)


@pytest.mark.parametrize(("data", "param", "code"), HOSTILE)
def test_a_bad_field_is_named(settings: Settings, data: Any, param: str | None, code: str) -> None:
    with pytest.raises(BadField) as caught:
        parse_job(data, settings)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.message
    str(caught.value).encode()  # fit for a response


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED_YET))
def test_openai_fields_that_are_not_supported_say_so(settings: Settings, name: str) -> None:
    with pytest.raises(BadField, match="not supported yet") as caught:
        parse_job({"prompt": "a", name: 1}, settings)
    assert (caught.value.param, caught.value.code) == (name, "unknown_parameter")


def test_too_few_samples_are_told_the_most_of_this_deployment(settings: Settings) -> None:
    with pytest.raises(BadField, match=r"from 1 to 16$"):
        parse_job({"prompt": "a", "n": 0}, settings)


def test_what_is_empty_is_refused_in_plain_words(settings: Settings) -> None:
    for body in ({"prompt": ""}, {"messages": []}):
        with pytest.raises(BadField, match=r": must have at least 1 (character|item, not 0)$"):
            parse_job(body, settings)


def test_names_that_a_response_cannot_carry_are_made_printable(settings: Settings) -> None:
    for name in ("\ud800", "\x00", "x" * 100_000):
        with pytest.raises(BadField) as caught:
            parse_job({"prompt": "a", name: 1}, settings)
        shown = str(caught.value)
        shown.encode()
        assert "\x00" not in shown
        assert len(shown) < 2_000


def test_a_complaint_can_be_placed_inside_an_array() -> None:
    inner = BadField("temperature", "is wrong", "invalid_value").inside("jobs[17]")
    assert inner.param == "jobs[17].temperature"
    assert BadField(None, "is wrong").inside("jobs[3]").param == "jobs[3]"


def test_everything_at_once_is_kept_and_read_back(settings: Settings) -> None:
    data = {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, USER],
        "chat_template_kwargs": {
            "thinking": False,
            "effort": "x-high",
            "n": 2**63 - 1,
            "f": 1e300,
            "null": None,
        },
        "n": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.25,
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"17": -100, "5": 2.5},
        "bad_words": ["damn"],
        "allowed_token_ids": [5, 17, 3],
        "seed": -5,
        "max_completion_tokens": 7,
        "min_tokens": 7,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "logprobs": True,
        "top_logprobs": 3,
        "repetition_detection": {"max_pattern_size": 9, "min_pattern_size": 1, "min_count": 3},
        "custom_id": "row-1",
        "metadata": {"k": "v"},
    }
    body = parse_job(data, settings)
    assert body.stored() == data
    assert body.written() == json.dumps(body.stored())
    assert JobBody.model_validate(body.stored()) == body
    sampling = body.sampling(settings.default_max_tokens, settings.max_n)
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.top_k) == (2, 0.0, 0.5, 0)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.25, 1.0, -0.5)
    assert (sampling.repetition_penalty, sampling.bad_words) == (1.25, ("damn",))
    assert (sampling.biases, sampling.allowed_token_ids) == (((5, 2.5), (17, -100.0)), (3, 5, 17))
    assert sampling.include_stop_str_in_output is True
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, None)
    assert sampling.repetition_detection == RepetitionDetectionParams(max_pattern_size=9, min_count=3)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (-5, 7, 7)
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (("a", "b"), (1, 2), True)


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "é\x00\n", "temperature": 1, "logit_bias": {"5": 1, "6": 0.1}, "stop": "a", "n": 2},
        {"messages": [USER, USER | {"content": [{"type": "text", "text": "a"}]}], "metadata": {"é": ""}},
        {"messages": [USER], "repetition_detection": {"max_pattern_size": 3}},
        {"messages": [USER], "chat_template_kwargs": {"a": None, "b": 0.1, "c": True}, "n": 1},
    ],
)
def test_a_body_is_written_as_it_is_stored(settings: Settings, data: dict[str, Any]) -> None:
    body = parse_job(data, settings)
    assert body.written() == json.dumps(body.stored())


def test_defaults_and_null_mean_the_same(settings: Settings) -> None:
    plain = parse_job({"prompt": "a"}, settings)
    nulls = parse_job({"prompt": "a", **dict.fromkeys(set(JobBody.model_fields) - {"prompt"})}, settings)
    assert plain == nulls
    assert plain.stored() == {"prompt": "a"}
    assert plain.written() == '{"prompt": "a"}'
    sampling = plain.sampling(settings.default_max_tokens, settings.max_n)
    assert (sampling.n, sampling.temperature, sampling.max_tokens, sampling.seed) == (1, 1.0, 50, None)


def test_what_a_template_is_told_is_another_body_and_the_same_sampling(settings: Settings) -> None:
    told, other, plain = (
        parse_job({"messages": [USER], "seed": 77, "chat_template_kwargs": given}, settings)
        for given in ({"enable_thinking": False}, {"enable_thinking": 0}, None)
    )
    assert len({told.written(), other.written(), plain.written()}) == 3
    assert told.sampling(50, 16) is plain.sampling(50, 16)  # checked once for both


def test_logprobs_as_many_as_one_result_may_hold(settings: Settings) -> None:
    most = {"prompt": "a", "logprobs": True, "top_logprobs": 19, "n": 10, "max_tokens": 500}
    for body, count in ((most, 19), ({"prompt": "a", "logprobs": True}, 0), ({"prompt": "a"}, None)):
        assert parse_job(body, settings).sampling(50, 16).logprobs == count
    with pytest.raises(BadField, match=r"max_completion_tokens × \(1 \+ top_logprobs\) .* 100200"):
        parse_job(most | {"max_tokens": None, "max_completion_tokens": 501}, settings)


def test_min_tokens_beyond_the_default_length_raises_the_length(settings: Settings) -> None:
    assert parse_job({"prompt": "a", "min_tokens": 60}, settings).sampling(50, 16).max_tokens == 60


def test_text_parts_and_a_single_stop_string(settings: Settings) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    body = parse_job({"messages": [{"role": "user", "content": parts}], "stop": "\n"}, settings)
    assert body.messages is not None
    assert body.messages[0].content == "one two"
    assert body.stop == ["\n"]


def test_texts_may_hold_anything_that_unicode_has(settings: Settings) -> None:
    text = "\x00 \u2028 🌙 \ufffd ￾"
    assert parse_job({"prompt": text}, settings).stored() == {"prompt": text}


def test_the_opening_is_the_system_message_or_the_start(settings: Settings) -> None:
    assert parse_job({"prompt": "start"}, settings).opening == "start"
    assert parse_job({"messages": [USER]}, settings).opening == "hi"
    chat = {"messages": [USER, {"role": "system", "content": "rules"}]}
    assert parse_job(chat, settings).opening == "rules"


def test_batch_metadata_follows_the_same_rules() -> None:
    assert parse_metadata(None) == {}
    assert parse_metadata({"a": "b"}) == {"a": "b"}
    with pytest.raises(BadField) as caught:
        parse_metadata({"a": 1})
    assert caught.value.param == "metadata.a"
