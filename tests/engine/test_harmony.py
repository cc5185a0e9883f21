"""Chats and answers in the format of gpt-oss: a template of that kind is rendered as transformers renders it, its
control tokens come from no client, and an answer's channels are one text without them.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from engine.detokenizer import Detokenizer
from engine.special_tokens import SpecialTokens
from engine.tokenizer import Tokenizer

CONTROLS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>")
# What the published one does with Jinja, in fewer words: macros, a namespace, names that nobody defined, today's date
TEMPLATE = """
{%- macro tools_of(tools) %}{% for tool in tools %}{{- "type " + tool.function.name + " = () => any;" }}{% endfor %}{% endmacro -%}
{%- macro system(identity) -%}
    {%- if model_identity is not defined %}{% set model_identity = identity %}{% endif -%}
    {{- model_identity + "\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
    {%- if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif -%}
    {{- "Reasoning: " + reasoning_effort }}
    {%- if builtin_tools is defined and builtin_tools is not none %}{{- "# Tools" }}{% endif -%}
    {{- "# Valid channels: analysis, commentary, final." }}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}{{ system("You are a model.") }}{{- "<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {%- set instructions = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}
    {%- set instructions = "" %}{% set rest = messages %}
{%- endif %}
{%- if instructions or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if instructions %}{{- "# Instructions\\n\\n" + instructions }}{% endif %}
    {%- if tools -%}{{- tools_of(tools) }}{% endif %}
    {{- "<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in rest -%}
    {%- if message.role == "assistant" -%}
        {%- if "<|channel|>final<|message|>" in message.content %}
            {{- raise_exception("a message with tags") }}
        {%- endif %}
        {%- if "tool_calls" in message %}{% set last.name = message.tool_calls[0].name %}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if "thinking" in message %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
            {%- set last.name = none %}
        {%- endif %}
    {%- elif message.role == "user" -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" }}{%- endif -%}
"""  # noqa: E501
ASK = {"role": "user", "content": "Two and two?"}
CHATS = [
    [ASK],
    [{"role": "system", "content": "Be brief."}, ASK],
    [{"role": "developer", "content": "Be brief."}, ASK, {"role": "assistant", "content": "4"}, ASK],
    [ASK, {"role": "assistant", "content": "Four."}],
]


@pytest.fixture(scope="module")
def pair() -> tuple[Tokenizer, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS])
    special = SpecialTokens.read({"eos_token": "<|return|>"}, {})
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|return|>")
    theirs.chat_template = TEMPLATE
    return Tokenizer(backend.to_str(), template=TEMPLATE, special_tokens=special), theirs


def ids_of(theirs: Any, chat: list[dict[str, str]], **variables: Any) -> list[int]:
    """What transformers makes of a chat, with the date of the moment: midnight may pass between two calls, so ours is
    compared with the one before it and the one after."""
    return list(theirs.apply_chat_template(chat, tokenize=True, **variables)["input_ids"])


@pytest.mark.parametrize("chat", CHATS, ids=len)
@pytest.mark.parametrize("prompt", [True, False])
def test_ids_of_a_chat_are_those_of_transformers(
    pair: tuple[Tokenizer, Any], chat: list[dict[str, str]], prompt: bool
) -> None:
    ours, theirs = pair
    before = ids_of(theirs, chat, add_generation_prompt=prompt)
    made = ours.encode_chat(chat, add_generation_prompt=prompt)
    assert made in (before, ids_of(theirs, chat, add_generation_prompt=prompt))


@pytest.mark.parametrize("effort", ["low", "high"])
def test_the_effort_is_that_of_transformers(pair: tuple[Tokenizer, Any], effort: str) -> None:
    ours, theirs = pair
    for chat in CHATS:
        given = {"reasoning_effort": effort}
        before = ids_of(theirs, chat, **given)
        made = ours.encode_chat(chat, add_generation_prompt=False, variables=given)
        assert made in (before, ids_of(theirs, chat, **given))
    assert f"Reasoning: {effort}#" in ours.render_chat([ASK], variables=given)


def test_a_client_opens_no_channel(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    chat = [ASK, {"role": "assistant", "content": "<|channel|>final<|message|>4<|return|>"}, ASK]
    channels = ours.encode_chat(chat).count(theirs.convert_tokens_to_ids("<|channel|>"))
    assert channels == 1  # the template's
    assert "<|channel|>final<|message|>4<|return|>" in ours.render_chat(chat)


def test_the_channels_of_an_answer_are_one_text(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    answer = (
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    token_ids = theirs(answer, add_special_tokens=False)["input_ids"]
    assert ours.decode(token_ids) == "analysisEasy.assistantfinal4"
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.decode(token_ids, skip_special_tokens=False) == answer
    growing = Detokenizer(ours)
    assert "".join(growing.push(token_id) for token_id in token_ids) == "analysisEasy.assistantfinal4"
