"""ChatTemplate: a checkpoint's Jinja template, rendered so that content stays content.

Owns what a template sees (what transformers gives it, rebuilt here because importing transformers' renderer would
load torch), the output cap, and the guard: a client's texts and words are rendered with `stand_ins`, so that no
control token comes of them, whatever the template does to them, and its own are told from those that a text spells.
Templates come from the operator's checkpoint, never from a client; `template_sandbox` bounds them all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from engine.invalid_parameter import InvalidParameter
from engine.stand_ins import StandIns, has_stand_in
from engine.template_sandbox import BUDGET, Budget, TemplateSandbox
from engine.template_variables import FIELD, TemplateVariables, check_variables

MAX_RENDERED_CHARS = 4 * 2**20
_NOT_ASCII = re.compile("[^\x00-\x7f\ud800-\udfff]")  # nor a stand-in
_ROLE = re.compile(r"[A-Za-z_-]{1,32}")

Message = Mapping[str, str]  # {"role": ..., "content": ...}


class ChatTemplateError(ValueError):
    """These messages cannot be rendered with this checkpoint's template. The message says why."""


class ChatTemplate:
    """`special_tokens`: template variables such as `bos_token`. `stand_ins`: of the tokenizer's control tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], stand_ins: StandIns) -> None:
        environment = TemplateSandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the checkpoint's chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._stand_ins = stand_ins

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: TemplateVariables | None = None,
    ) -> str:
        """The text, with stand-ins in what came from messages and `variables`, which the template may read or not.

        Raises `ChatTemplateError` for messages or variables that are malformed, refused by the template, or too much.
        """
        given = self._checked(variables or {}, add_generation_prompt)
        for i, message in enumerate(messages):
            _check(message, i)
        if not messages:
            raise ChatTemplateError("messages: at least one message is needed")
        # Guarded: nothing that a template does to a text can make a control token of it. Close: what the client
        # wrote, but for control tokens that it spells, so that a template finds in it what it looks for.
        stand_ins = self._stand_ins
        guarded_messages = [_with_content(message, stand_ins.for_ends) for message in messages]
        close_messages = [_with_content(message, stand_ins.for_spelled) for message in messages]
        guarded_given = _with_words(given, stand_ins.for_ends)
        close_given = _with_words(given, stand_ins.for_spelled)
        guarded = self._rendered(guarded_messages, guarded_given)
        if (close_messages, close_given) == (guarded_messages, guarded_given):
            return guarded
        close = self._rendered(close_messages, close_given)
        if stand_ins.put_back(close) == stand_ins.put_back(guarded):
            return guarded
        # The template looks for such letters, as for </think>. It may not make control tokens of what it finds.
        same_controls = stand_ins.spelled.findall(close) == stand_ins.spelled.findall(guarded)
        return close if same_controls else guarded

    def _checked(self, variables: TemplateVariables, add_generation_prompt: bool) -> TemplateVariables:
        try:
            check_variables(variables)
        except InvalidParameter as error:
            raise ChatTemplateError(str(error)) from None
        for name, value in variables.items():
            if name in self._special_tokens:
                raise ChatTemplateError(f"{FIELD}.{name}: names a special token of this checkpoint")
            if isinstance(value, str) and self._stand_ins.spelled.search(value):
                raise ChatTemplateError(f"{FIELD}.{name}: the word spells a control token of this checkpoint")
        return {**variables, "add_generation_prompt": add_generation_prompt}

    def _rendered(self, messages: Sequence[Message], given: TemplateVariables) -> str:
        chunks: list[str] = []
        size = 0
        try:
            for chunk in self._template.generate(
                {
                    **self._special_tokens,
                    **given,
                    "messages": messages,
                    "tools": None,  # as transformers: templates ask `is not none`
                    "documents": None,
                    BUDGET: Budget(),
                }
            ):
                size += len(chunk)
                if size > MAX_RENDERED_CHARS:
                    raise ChatTemplateError(f"the rendered chat exceeds {MAX_RENDERED_CHARS} characters")
                chunks.append(chunk)
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            if isinstance(error, ChatTemplateError):
                raise
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        return "".join(chunks)


def _check(message: Message, index: int) -> None:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise ChatTemplateError(f"messages[{index}]: must have exactly the fields role and content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ChatTemplateError(f"messages[{index}].role: must be a word such as system, user or assistant")
    if not isinstance(content, str):
        raise ChatTemplateError(f"messages[{index}].content: must be a string")
    if has_stand_in(content):
        raise ChatTemplateError(f"messages[{index}].content: the text is not valid Unicode")


def _with_content(message: Message, change: Callable[[str], str]) -> Message:
    return {"role": message["role"], "content": change(message["content"])}


def _with_words(variables: TemplateVariables, change: Callable[[str], str]) -> TemplateVariables:
    return {name: change(value) if isinstance(value, str) else value for name, value in variables.items()}


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here it renders what it holds."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it a plain class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # templates call it by this name, too
    return datetime.now().strftime(format)
