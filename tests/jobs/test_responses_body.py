"""The body of a response: what becomes of each field."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.bad_field import BadField
from jobs.responses_body import IGNORED, OFF, AskedResponse, read_response
from jobs.settings import Settings
from jobs.template_kwargs import EFFORTS

SETTINGS = Settings(model="tiny")
SCHEMA = {"type": "object", "properties": {}}


def asked(**fields: Any) -> AskedResponse:
    return read_response({"model": "m", "input": "hi"} | fields, SETTINGS)


def test_a_text_and_its_instructions() -> None:
    made = asked(instructions="Be brief.", max_output_tokens=9, temperature=0, top_p=0.5, metadata={"a": "b"})
    assert made.body.stored() == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "metadata": {"a": "b"},
    }
    assert not made.background
    assert asked(background=True, store=True).background


def test_a_conversation() -> None:
    answer = {"type": "output_text", "text": "so", "annotations": [], "logprobs": []}
    made = asked(
        input=[
            {"role": "developer", "content": "Be brief."},
            {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, answer]},
            {
                "id": "msg_1",
                "status": "completed",
                "type": "message",
                "role": "assistant",
                "content": [answer],
            },
        ]
    )
    assert made.body.messages is not None
    assert [(one.role, one.content) for one in made.body.messages] == [
        ("system", "Be brief."),
        ("user", "aso"),
        ("assistant", "so"),
    ]


def test_the_form_of_the_text() -> None:
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True, "description": None}
    body = asked(text={"format": form}).body
    assert body.stored()["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
    }
    assert asked(text={"format": {"type": "text"}}).body.sampling(9, 9) == asked().body.sampling(9, 9)
    assert asked(text={"format": None}) == asked(text={}) == asked(text=None) == asked()


def test_the_effort_is_a_variable_of_the_template() -> None:
    for effort in EFFORTS:
        made = asked(reasoning={"effort": effort, "summary": None})
        assert made.body.chat_template_kwargs == {"reasoning_effort": effort}
    for nothing in (None, {}, {"effort": None}, {"effort": "none"}, {"summary": None}):
        assert asked(reasoning=nothing) == asked()


def test_what_is_ignored_or_off_changes_nothing() -> None:
    for name in IGNORED:
        assert asked(**{name: "anything"}) == asked()
    for name, values in OFF.items():
        for value in (*values, None):
            assert asked(**{name: value}) == asked(), name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 7}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 1}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input[0].name"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"instructions": ["x"]}, "instructions"),
        ({"background": 1}, "background"),
        ({"background": True, "store": False}, "store"),
        ({"stream": True}, "stream"),
        ({"stream": 0}, "stream"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"reasoning": "low"}, "reasoning"),
        ({"reasoning": {"effort": "most"}}, "reasoning.effort"),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, "reasoning.summary"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"text": "x"}, "text"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "banana"}}}},
            "text.format.schema",
        ),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_what_cannot_be_honoured_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadField) as caught:
        asked(**fields)
    assert caught.value.param == param
