"""chat_template_kwargs of a body, and OpenAI's `reasoning_effort`, which becomes one of them.

Owns the field's way through pydantic and OpenAPI, and the words of the effort. What the map may hold is
`engine.template_variables`' own. Refuses to know which template reads what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from engine.invalid_parameter import InvalidParameter
from engine.template_variables import FIELD, MAX_VARIABLES, NAME, WORD, check_variables
from jobs.bad_field import BadField

EFFORT: Final = "reasoning_effort"  # OpenAI's field of a chat, and the variable's name, as in vLLM
EFFORTS: Final = ("minimal", "low", "medium", "high", "xhigh", "max")
NO_EFFORT: Final = "none"  # asks for nothing, as null


def _checked(variables: dict[str, Any]) -> dict[str, Any]:
    try:
        check_variables(variables)
    except InvalidParameter as error:
        raise PydanticCustomError(f"one_of:{error.param}", error.message) from None
    return variables


TemplateKwargs = Annotated[
    dict[str, Any],
    AfterValidator(_checked),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": MAX_VARIABLES,
            "propertyNames": {"pattern": f"^{NAME}$"},
            "additionalProperties": {
                "type": ["boolean", "number", "string", "null"],
                "pattern": f"^{WORD}$",
            },
        }
    ),
]


def effort_in(value: object, place: str) -> str | None:
    """The effort that is asked for at `place`; None: none. Raises `BadField`."""
    if value is None or value == NO_EFFORT:
        return None
    if not isinstance(value, str) or value not in EFFORTS:
        raise BadField(place, f"must be one of {', '.join((NO_EFFORT, *EFFORTS))}")
    return value


def with_effort(given: object, effort: str) -> object:
    """`given`, a body's chat_template_kwargs, with `effort` in it. Raises `BadField` where it has another."""
    if given is not None and not isinstance(given, Mapping):
        return given  # refused with the rest of the body
    known = dict(given or {})
    if known.setdefault(EFFORT, effort) != effort:
        raise BadField(EFFORT, f"{FIELD} has another {EFFORT}: give one of them")
    return known
