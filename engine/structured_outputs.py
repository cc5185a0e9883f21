"""StructuredOutputsParams: the form that a request's text must have.

Owns the fields, their sizes and one canonical way to write each, so that equal wishes are equal values: they cross
the wire, name a compiled grammar and tell whether two requests are the same. Refuses to know grammars: whether a
schema or an expression can be honoured is found out where it is compiled (`grammars`). Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.invalid_parameter import InvalidParameter

MAX_SOURCE_BYTES = 65_536  # of a schema, an expression, a grammar, or all choices, in UTF-8
MAX_CHOICES = 1024
MAX_SCHEMA_DEPTH = 100  # objects and lists inside each other

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]
KINDS: tuple[Kind, ...] = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of the first five (names follow vLLM's class of the same name). Raises `InvalidParameter`.

    `json`: a JSON Schema, as a map or as text; kept as compact text in its own order, because properties come in
    the schema's order. `json_object`: any JSON object. `regex`: the whole text matches, in the syntax of Rust's
    regex crate, without look-around. `choice`: the text is one of these. `grammar`: Lark in llguidance's dialect
    with a rule `start`, or GBNF (EBNF as llama.cpp and vLLM write it) with a rule `root`.
    `asked_as`: the field's name where this came from, for refusals; equal wishes may have come from different fields.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False  # JSON without any white space between its tokens
    asked_as: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool | None):
            raise InvalidParameter(_path("json_object"), "must be true or false")
        if not isinstance(self.disable_any_whitespace, bool):
            raise InvalidParameter(_path("disable_any_whitespace"), "must be true or false")
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise InvalidParameter("structured_outputs", f"must have exactly one of {', '.join(KINDS)}")
        if self.disable_any_whitespace and not given[0].startswith("json"):
            raise InvalidParameter(_path("disable_any_whitespace"), "is for json and json_object only")
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        elif self.json_object is None:
            _text(given[0], getattr(self, given[0]))

    @property
    def kind(self) -> Kind:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def param(self) -> str:
        """The name of the field that says what is wanted, for refusals."""
        return self.asked_as or _path(self.kind)


def _path(field: str) -> str:
    return f"structured_outputs.{field}"


def _text(field: str, given: object) -> str:
    if not isinstance(given, str) or not given:
        raise InvalidParameter(_path(field), "must be a string that is not empty")
    try:
        size = len(given.encode())
    except UnicodeEncodeError:
        raise InvalidParameter(_path(field), "must be valid Unicode, without lone surrogates") from None
    if size > MAX_SOURCE_BYTES:
        raise InvalidParameter(_path(field), f"has {size} bytes, at most {MAX_SOURCE_BYTES} are allowed")
    return given


def _schema(given: object) -> str:
    """Compact JSON of a schema, keys in the order they were given."""
    try:
        if isinstance(given, str):
            given = json.loads(_text("json", given))
        text = json.dumps(given, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except InvalidParameter:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidParameter(_path("json"), f"is not JSON: {str(error)[:200]}") from None
    if not isinstance(given, Mapping):
        raise InvalidParameter(_path("json"), "must be a JSON Schema: an object")
    if "x-guidance" in given:  # options of the library underneath, which could turn checks off
        raise InvalidParameter(_path("json"), "must not have the key x-guidance")
    level: list[Any] = [given]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise InvalidParameter(_path("json"), f"is nested more than {MAX_SCHEMA_DEPTH} levels deep")
    return _text("json", text)


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _choices(given: Any) -> tuple[str, ...]:
    """Without repetitions, in the order they were given."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InvalidParameter(_path("choice"), "must be a list of strings")
    choices = tuple(dict.fromkeys(_text("choice", one) for one in given))
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidParameter(_path("choice"), f"must have 1 to {MAX_CHOICES} strings")
    _text("choice", "".join(choices))
    return choices
