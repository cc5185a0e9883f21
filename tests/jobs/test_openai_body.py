"""OpenAI's bodies: what becomes of each field, on both urls. (Lines of files: test_batch_file.)"""

from __future__ import annotations

from typing import Any, get_args

import pytest
from openai.types.shared.reasoning_effort import ReasoningEffort

from jobs.bad_field import BadField
from jobs.openai_body import CHAT, COMPLETIONS, IGNORED, OFF, Asked, read_asked
from jobs.settings import Settings
from jobs.template_kwargs import EFFORTS

SETTINGS = Settings(model="tiny")
USER = {"role": "user", "content": "hi"}


def chat(**fields: Any) -> Asked:
    return read_asked(CHAT, {"model": "m", "messages": [USER]} | fields, SETTINGS, may_stream=True)


def text(**fields: Any) -> Asked:
    return read_asked(COMPLETIONS, {"model": "m", "prompt": "p"} | fields, SETTINGS, may_stream=True)


def test_a_plain_chat() -> None:
    asked = chat(max_completion_tokens=5, metadata={"a": "b"}, response_format={"type": "json_object"})
    assert asked.body.stored() == {
        "model": "m",
        "messages": [USER],
        "max_completion_tokens": 5,
        "metadata": {"a": "b"},
        "response_format": {"type": "json_object"},
    }
    assert (asked.stream, asked.include_usage, asked.store) == (False, False, False)


def test_what_is_ignored_or_off_changes_nothing() -> None:
    for name in IGNORED - {"store"}:
        assert chat(**{name: "anything"}) == chat(), name
    for name, values in OFF.items():
        for value in (*values, None):
            assert chat(**{name: value}) == chat(), name
    assert chat(store=True).store
    assert chat(store=True).body == chat(store=False).body == chat().body
    for name in ("echo", "stream", "best_of"):  # 0 is not false, true is not 1
        with pytest.raises(BadField) as caught:
            chat(**{name: True if name == "best_of" else 0})
        assert caught.value.param == name


def test_the_effort_is_a_variable_of_the_template() -> None:
    # The words are those of OpenAI's own client.
    words = {word for one in get_args(ReasoningEffort) for word in get_args(one)}
    assert words == {"none", *EFFORTS}
    for effort in EFFORTS:
        told = {"reasoning_effort": effort}
        assert chat(**told).body.chat_template_kwargs == told
        assert chat(**told, chat_template_kwargs=told) == chat(chat_template_kwargs=told) == chat(**told)
    both = chat(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False}).body
    assert both.chat_template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}
    given = {"chat_template_kwargs": {"reasoning_effort": "high"}}
    for nothing in ("none", None):  # asks for nothing, and leaves what is asked for
        assert chat(reasoning_effort=nothing, **given) == chat(**given)
    assert given == {"chat_template_kwargs": {"reasoning_effort": "high"}}


def test_a_stream_and_its_options() -> None:
    assert chat(stream=True).stream
    asked = text(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    assert (asked.stream, asked.include_usage) == (True, True)
    assert not chat(stream=True, stream_options={}).include_usage
    assert not chat(stream=None, stream_options=None).stream


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "most"}, "reasoning_effort"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"reasoning_effort": ["high"]}, "reasoning_effort"),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "reasoning_effort",
        ),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": None}}, "reasoning_effort"),
        ({"reasoning_effort": "low", "chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "<think>"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"tools": None}}, "chat_template_kwargs.tools"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [USER | {"name": "eve"}]}, "messages[0].name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"prompt": "p"}, "prompt"),
        ({"jobs": []}, "jobs"),
    ],
)
def test_a_chat_that_cannot_be_honoured(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadField) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "s"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 2, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2, "stream": True}, "logprobs"),
        ({"messages": [USER]}, "messages"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ],
)
def test_a_text_that_cannot_be_honoured(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadField) as caught:
        text(**fields)
    assert caught.value.param == param


def test_text_completions_have_openais_defaults() -> None:
    assert text().body.max_tokens == 16
    assert text(min_tokens=20).body.max_tokens == 20
    assert text(max_tokens=3).body.max_tokens == 3
    assert text(max_completion_tokens=3).body.max_tokens is None
    assert text(prompt=["one"]).body.prompt == "one"
    asked = text(logprobs=0)
    assert (asked.body.logprobs, asked.body.top_logprobs) == (True, 0)
    assert text(logprobs=True, top_logprobs=2).body.top_logprobs == 2


def test_an_answer_can_be_put_back_into_the_conversation() -> None:
    answer = {"role": "assistant", "content": "so", "refusal": None, "tool_calls": None, "annotations": []}
    for thoughts in ({}, {"reasoning_content": None}, {"reasoning_content": "hm"}, {"reasoning": "hm"}):
        asked = chat(messages=[{"role": "developer", "content": "Be brief."}, USER, answer | thoughts, USER])
        assert asked.body.messages is not None
        assert [one.role for one in asked.body.messages] == ["system", "user", "assistant", "user"]
    with pytest.raises(BadField, match="reasoning_content"):
        chat(messages=[USER, answer | {"reasoning_content": 5}])
