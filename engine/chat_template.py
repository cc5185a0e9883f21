"""ChatTemplate: a checkpoint's Jinja template, rendered so that content stays content.

Owns what a template sees (what transformers gives it, rebuilt here because importing transformers' renderer would
load torch), the output cap, and the guard: where a message's text spells a control token, a nonce is put in front
of it before rendering, so that the tokenizer can tell it from the control tokens the template itself wrote.
Templates come from the operator's checkpoint, never from a client; `template_sandbox` bounds them all the same.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from engine.template_sandbox import BUDGET, Budget, TemplateSandbox

MAX_RENDERED_CHARS = 4 * 2**20
_ROLE = re.compile(r"[A-Za-z_-]{1,32}")

Message = Mapping[str, str]  # {"role": ..., "content": ...}


class ChatTemplateError(ValueError):
    """These messages cannot be rendered with this checkpoint's template. The message says why."""


class Rendered:
    """Rendered text. `nonce` stands in front of every control token that came from a message's text."""

    def __init__(self, guarded: str, nonce: str) -> None:
        self.guarded = guarded
        self.nonce = nonce

    @property
    def text(self) -> str:
        """As transformers renders it."""
        return self.guarded.replace(self.nonce, "")


class ChatTemplate:
    """`special_tokens`: template variables such as `bos_token`. `control_tokens`: what content must not spell."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], control_tokens: Iterable[str]) -> None:
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
        alternatives = "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True)))
        self._control = (
            re.compile(f"(?={alternatives})") if alternatives else None
        )  # every start, overlaps too

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> Rendered:
        """Raises `ChatTemplateError` for messages that are malformed, refused by the template, or too much."""
        nonce = "qz" + secrets.token_hex(12)  # letters and digits: no filter of a template changes them
        guarded = [self._guarded(message, i, nonce) for i, message in enumerate(messages)]
        if not guarded:
            raise ChatTemplateError("messages: at least one message is needed")
        chunks: list[str] = []
        size = 0
        try:
            for chunk in self._template.generate(
                {
                    **self._special_tokens,
                    "messages": guarded,
                    "add_generation_prompt": add_generation_prompt,
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
        return Rendered("".join(chunks), nonce)

    def _guarded(self, message: Message, index: int, nonce: str) -> dict[str, str]:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ChatTemplateError(f"messages[{index}]: must have exactly the fields role and content")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise ChatTemplateError(
                f"messages[{index}].role: must be a word such as system, user or assistant"
            )
        if not isinstance(content, str):
            raise ChatTemplateError(f"messages[{index}].content: must be a string")
        return {"role": role, "content": self._control.sub(nonce, content) if self._control else content}


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
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # templates call it by this name, too
    return datetime.now().strftime(format)
