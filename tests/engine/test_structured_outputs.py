"""StructuredOutputsParams: what is accepted, and that equal wishes are equal values, here and behind the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine import SamplingParams, StructuredOutputsParams
from engine.request import Request, RequestId
from engine.run import identity
from engine.sampling_params import InvalidParameter
from engine.structured_outputs import MAX_CHOICES, MAX_SCHEMA_DEPTH, MAX_SOURCE_BYTES
from engine.wire import Add, WireError, decode, encode


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "structured_outputs"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs"),
        ({"json_object": False}, "structured_outputs"),
        ({"json_object": 1}, "structured_outputs.json_object"),
        ({"regex": ""}, "structured_outputs.regex"),
        ({"regex": 5}, "structured_outputs.regex"),
        ({"regex": "a\ud800"}, "structured_outputs.regex"),
        ({"regex": "é" * (MAX_SOURCE_BYTES // 2 + 1)}, "structured_outputs.regex"),
        ({"grammar": ["start"]}, "structured_outputs.grammar"),
        ({"choice": "yes"}, "structured_outputs.choice"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": ["a", ""]}, "structured_outputs.choice"),
        ({"choice": ["a", 1]}, "structured_outputs.choice"),
        ({"choice": [str(i) for i in range(MAX_CHOICES + 1)]}, "structured_outputs.choice"),
        ({"choice": ["a" * 40_000, "b" * 40_000]}, "structured_outputs.choice"),
        ({"json": "{"}, "structured_outputs.json"),
        ({"json": "[]"}, "structured_outputs.json"),
        ({"json": True}, "structured_outputs.json"),
        ({"json": {"const": float("nan")}}, "structured_outputs.json"),
        ({"json": {"const": {1, 2}}}, "structured_outputs.json"),
        ({"json": {"const": "\udfff"}}, "structured_outputs.json"),
        ({"json": {"enum": ["x" * MAX_SOURCE_BYTES]}}, "structured_outputs.json"),
        ({"json": '{"a":' * 5000 + "1" + "}" * 5000}, "structured_outputs.json"),
        ({"json": nested(MAX_SCHEMA_DEPTH + 1)}, "structured_outputs.json"),
        ({"json": {"x-guidance": {"lenient": True}}}, "structured_outputs.json"),
        ({"regex": "a", "disable_any_whitespace": True}, "structured_outputs.disable_any_whitespace"),
        ({"json_object": True, "disable_any_whitespace": 1}, "structured_outputs.disable_any_whitespace"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [{"ignore_eos": True}, {"min_tokens": 1}, {"allowed_token_ids": (5,)}],
    ids=lambda f: next(iter(f)),
)
def test_what_could_contradict_a_grammar_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match="cannot be combined with structured_outputs") as caught:
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), **fields)
    assert [caught.value.param] == list(fields)


def test_sampling_params_takes_nothing_else() -> None:
    with pytest.raises(InvalidParameter, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_the_deepest_schema_is_accepted() -> None:
    assert StructuredOutputsParams(json=nested(MAX_SCHEMA_DEPTH)).json == json.dumps(
        nested(MAX_SCHEMA_DEPTH), separators=(",", ":")
    )


def test_equal_wishes_are_equal_values() -> None:
    """However a schema was written down; in its own order, which is the order of the answer's properties."""
    schema = {"properties": {"b": {"const": "é"}, "a": {}}, "type": "object"}
    one = StructuredOutputsParams(json=schema)
    other = StructuredOutputsParams(json=json.dumps(schema, indent=4))
    assert one == other
    assert hash(one) == hash(other)
    assert one.json == '{"properties":{"b":{"const":"é"},"a":{}},"type":"object"}'
    reordered = {"properties": {"a": {}, "b": {"const": "é"}}, "type": "object"}
    assert one != StructuredOutputsParams(json=reordered)
    assert StructuredOutputsParams(choice=["a", "b", "a"]).choice == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"type": ["string", "null"], "default": None}},
        {"json_object": True, "disable_any_whitespace": True},
        {"regex": "é+\x00"},
        {"choice": ("a", "🌙")},
        {"grammar": "start: /a/"},
    ],
)
def test_they_cross_the_wire(fields: dict[str, Any]) -> None:
    sampling = SamplingParams(seed=1, structured_outputs=StructuredOutputsParams(**fields))
    sent = Add((Request(id=RequestId("a", 1), prompt_token_ids=(5,), sampling=sampling),))
    assert decode(encode(sent)[4:]) == sent


def test_a_schema_that_is_no_text_does_not_cross_it() -> None:
    sampling = SamplingParams(seed=1, structured_outputs=StructuredOutputsParams(json={"a": 1}))
    body = encode(Add((Request(id=RequestId("a", 1), prompt_token_ids=(5,), sampling=sampling),)))[4:]
    text = b'\xa7{"a":1}'  # msgpack: a string of 7 bytes
    assert body.count(text) == 1
    for broken in (b"\x81\xa1a\x01", b"\x05"):  # a map {"a": 1}, and a number
        with pytest.raises(WireError, match="structured_outputs"):
            decode(body.replace(text, broken))


def test_only_equal_wishes_are_run_as_one() -> None:
    def named(**fields: Any) -> Request:
        sampling = SamplingParams(seed=1, structured_outputs=StructuredOutputsParams(**fields))
        return Request(id=RequestId("a", 1), prompt_token_ids=(5,), sampling=sampling)

    assert identity(named(json='{"a": 1}')) == identity(named(json={"a": 1}))
    assert identity(named(regex="a")) != identity(named(regex="b"))
