"""Variables that a client hands to a chat template: the ids are those of transformers, no control token comes of a
word, and names that mean something already are refused.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.chat_template import ChatTemplate, ChatTemplateError
from engine.invalid_parameter import InvalidParameter
from engine.special_tokens import SpecialTokens
from engine.stand_ins import StandIns
from engine.template_variables import MAX_VARIABLES, RESERVED, check_variables
from engine.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import CONTROLS, KINDS

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ASK = [{"role": "user", "content": "the fox"}]
# Qwen3's switch, gpt-oss's effort, and a number, a null and a name that nobody sets
TEMPLATE = """
{{- bos_token }}
{%- if reasoning_effort is defined %}{{- "Reasoning: " + reasoning_effort + "<|end|>" }}{% endif %}
{%- for message in messages %}{{- "<|user|>" + message.role + "\\n" + message.content + "<|end|>\\n" }}{% endfor %}
{%- if budget is defined and budget is not none %}{{- "at most " ~ budget * 2 }}{% endif %}
{%- if add_generation_prompt %}
    {{- "<|user|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{% endif %}
{%- endif %}
"""
GIVEN: list[dict[str, Any]] = [
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"enable_thinking": None},
    {"enable_thinking": 0},  # not false
    {"enable_thinking": False, "reasoning_effort": "high"},
    {"reasoning_effort": "x.y_z-1"},
    {"budget": 2**62, "unread": "word"},
    {"budget": 0.1},
    {"budget": None},
]


def pair(kind: str, template: str = TEMPLATE) -> tuple[Tokenizer, Any]:
    backend = KINDS[kind]()
    unk = {"unk_token": "<unk>"} if "<unk>" in backend.get_vocab() else {}
    theirs: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL, **unk)
    theirs.chat_template = template
    special = SpecialTokens.read(SPECIAL | {"unk_token": "<unk>"}, {})
    return Tokenizer(backend.to_str(), template=template, special_tokens=special), theirs


def made(source: str, **names: str) -> ChatTemplate:
    return ChatTemplate(source, names, StandIns(CONTROLS))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str) -> None:
    ours, theirs = pair(kind)
    for given in GIVEN:
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(ASK, tokenize=True, add_generation_prompt=prompt, **given)
            got = ours.encode_chat(ASK, add_generation_prompt=prompt, variables=given)
            assert got == list(wanted["input_ids"]), given
        text = theirs.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True, **given)
        assert ours.render_chat(ASK, variables=given) == text


def test_a_switch_and_an_effort_change_the_text_and_an_unread_name_does_not() -> None:
    ours, _ = pair("byte-level")
    plain = ours.render_chat(ASK)
    assert ours.render_chat(ASK, variables={"enable_thinking": False}) == f"{plain}<think>\n\n</think>\n\n"
    assert "Reasoning: low<|end|>" in ours.render_chat(ASK, variables={"reasoning_effort": "low"})
    assert ours.render_chat(ASK, variables={"unread": True}) == ours.render_chat(ASK, variables={}) == plain


def with_a_control_word(template: str) -> Tokenizer:
    """Whose control tokens are CONTROLS, and `high`."""
    backend = KINDS["byte-level"]()
    backend.add_special_tokens([AddedToken("high", special=True, normalized=False)])
    special = SpecialTokens.read(SPECIAL, {})
    return Tokenizer(backend.to_str(), template=f"<s>{template}<|end|>", special_tokens=special)


@pytest.mark.parametrize("glued", ["{{ word ~ 'h' }}", "{{ word }}h", "{{ [word, 'h'] | join }}"])
def test_no_word_becomes_a_control_token_where_those_are_words_too(glued: str) -> None:
    ours = with_a_control_word(glued)
    token_ids = ours.encode_chat(ASK, variables={"word": "hig"})
    controls = [token for token in token_ids if token in ours.control_ids]
    assert [ours.token_text(token) for token in controls] == ["<s>", "<|end|>"]
    assert ours.decode(token_ids) == "high"
    with pytest.raises(
        ChatTemplateError, match=r"chat_template_kwargs\.word: the word spells a control token"
    ):
        ours.encode_chat(ASK, variables={"word": "so.high"})


def test_a_template_can_compare_a_word_whatever_the_control_tokens_are() -> None:
    ours = with_a_control_word("{% if word == 'hug' %}yes: {% endif %}{{ word }}")
    assert ours.decode(ours.encode_chat(ASK, variables={"word": "hug"})) == "yes: hug"


def names_of_transformers() -> set[str]:
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return set(parameters) - {"self", "kwargs"}


@pytest.mark.parametrize(
    "name", sorted(RESERVED | {"bos_token", "pad_token", "image_token", "a__b", "__class__"})
)
def test_a_name_that_means_something_already_is_refused(name: str) -> None:
    with pytest.raises(InvalidParameter, match="reserved") as caught:
        check_variables({name: 1})
    assert caught.value.param == f"chat_template_kwargs.{name}"
    with pytest.raises(ChatTemplateError, match=f"chat_template_kwargs.{name}: "):
        made("").render(ASK, variables={name: 1})


def test_the_reserved_names_are_all_that_there_are() -> None:
    ours = made("")._template.environment.globals
    assert ours.keys() >= ImmutableSandboxedEnvironment().globals.keys()
    assert ours.keys() <= RESERVED
    assert names_of_transformers() <= RESERVED
    for name in ("self", "loop", "caller", "varargs", "kwargs", "super"):  # Jinja's, each as it is documented
        assert name in RESERVED


def test_a_special_token_with_a_name_of_its_own_is_not_replaced() -> None:
    template = made("{{ image }}", image="<img>")
    assert template.render(ASK) == "<img>"
    with pytest.raises(ChatTemplateError, match=r"chat_template_kwargs\.image: names a special token"):
        template.render(ASK, variables={"image": "x"})


@pytest.mark.parametrize("name", ["", "1a", "a b", "a-b", "é", "a\n", "a" * 65, "\ud800", "{{x}}", 1, None])
def test_what_is_no_name(name: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check_variables({name: 1})
    assert caught.value.param == "chat_template_kwargs"
    caught.value.message.encode()


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a b",
        "<s>",
        "<|end|>",
        "high\n",
        "é",
        "\ud800",
        "a" * 65,
        "{{7*7}}",
        2**63,
        -(2**63) - 1,
        10**400,
        float("nan"),
        float("inf"),
        [],
        ["a"],
        {},
        {"a": 1},
        b"a",
    ],
    ids=lambda value: json.dumps(repr(value)[:20]),
)
def test_what_is_no_value(value: Any) -> None:
    with pytest.raises(InvalidParameter, match="must be true, false, null") as caught:
        check_variables({"ok": 1, "effort": value})
    assert caught.value.param == "chat_template_kwargs.effort"


def test_the_largest_that_is_taken() -> None:
    check_variables({f"{'n' * 62}{i:02}": -(2**63) for i in range(MAX_VARIABLES)})
    check_variables({"a": "w" * 64, "_b": 2**63 - 1, "C9": 1e308})
    with pytest.raises(InvalidParameter, match="at most 16"):
        check_variables({f"n{i}": 1 for i in range(MAX_VARIABLES + 1)})


def test_a_template_that_cannot_use_a_value_says_so() -> None:
    ours, _ = pair("byte-level")
    with pytest.raises(ChatTemplateError, match="the chat template refuses"):
        ours.encode_chat(ASK, variables={"reasoning_effort": 5})


def test_a_number_takes_no_more_steps_than_a_template_has() -> None:
    for source in ("{% for i in range(n) %}x{% endfor %}", "{{ 'x' * n }}", "{{ 10 ** n }}"):
        with pytest.raises(ChatTemplateError):
            made(source).render(ASK, variables={"n": 2**62})
