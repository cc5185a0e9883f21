"""OpenAI's body of `/v1/responses`, turned into a job.

Owns which of its fields are honoured, which change nothing here, and which values of the others ask for nothing; what
is left is refused by name. A response is one text: conversations that OpenAI would keep, tools and summaries of
reasoning are not ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from jobs.bad_field import BadField
from jobs.body import JobBody, parse_job
from jobs.openai_body import is_one_of, plain_messages
from jobs.settings import Settings
from jobs.template_kwargs import effort_in, with_effort

# fmt: off
IGNORED: Final = frozenset({
    "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user",
})
# Values that ask for nothing; so does null, everywhere.
OFF: Final[dict[str, tuple[Any, ...]]] = {
    "stream": (False,), "tools": ([],), "tool_choice": ("none", "auto"), "include": ([],),
    "truncation": ("disabled",), "top_logprobs": (0,),
}
REFUSED: Final = frozenset({
    *OFF, "conversation", "context_management", "max_tool_calls", "moderation", "previous_response_id", "prompt",
    "stream_options",
})
# fmt: on
# Under OpenAI's other names in a job.
TAKEN: Final = {
    "model": "model",
    "temperature": "temperature",
    "top_p": "top_p",
    "metadata": "metadata",
    "max_output_tokens": "max_completion_tokens",
}
_OURS: Final = {"max_completion_tokens": "max_output_tokens", "messages": "input"}
_FORMAT: Final = re.compile(r"^response_format(\.json_schema)?")
_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text"})
_ITEM_EXTRAS: Final = frozenset({"type", "id", "status", "phase"})
_PART_EXTRAS: Final = frozenset({"annotations", "logprobs"})


@dataclass(frozen=True, slots=True)
class AskedResponse:
    """One request. `background`: the client asks again for the answer."""

    body: JobBody
    background: bool
    store: bool


def read_response(given: Mapping[str, Any], settings: Settings) -> AskedResponse:
    """Raises `BadField` for the first thing that is wrong or cannot be honoured."""
    rest = {
        name: value
        for name, value in given.items()
        if value is not None and name not in IGNORED and not is_one_of(value, OFF.get(name, ()))
    }
    background, store = (_flag(rest, name) for name in ("background", "store"))
    if background and store is False:
        raise BadField("store", "a response in the background is always stored", "unsupported_value")
    if "input" not in rest:
        raise BadField("input", "is required", "missing_required_parameter")
    job: dict[str, Any] = {ours: rest.pop(name) for name, ours in TAKEN.items() if name in rest}
    job["messages"] = _messages(rest.pop("input"), rest.pop("instructions", None))
    if (form := _format(rest.pop("text", None))) is not None:
        job["response_format"] = form
    if (effort := _effort(rest.pop("reasoning", None))) is not None:
        job["chat_template_kwargs"] = with_effort(None, effort)
    for name in rest:
        known = "this OpenAI field is not supported yet" if name in REFUSED else "unknown field"
        raise BadField(name, f"{known}; unknown fields are refused", "unknown_parameter")
    try:
        body = parse_job(job, settings, forms=True)
    except BadField as error:
        raise BadField(field_of(error.param), error.message, error.code) from None
    return AskedResponse(body, bool(background), bool(store))


def field_of(param: str | None) -> str | None:
    """What a response calls a field of its job."""
    first, _, more = (param or "").partition("[")
    name = _FORMAT.sub("text.format", _OURS.get(first, first))
    return f"{name}[{more}" if more else name or None


def _flag(rest: dict[str, Any], name: str) -> bool | None:
    value = rest.pop(name, None)
    if value is not None and not isinstance(value, bool):
        raise BadField(name, "must be true or false", "invalid_type")
    return value


def _messages(given: object, instructions: object) -> Any:
    head = []
    if instructions is not None:
        if not isinstance(instructions, str):
            raise BadField("instructions", "must be a string", "invalid_type")
        head = [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*head, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise BadField("input", "must be a string or a list of at least one message", "invalid_type")
    messages = [_message(item, f"input[{i}]") for i, item in enumerate(given) if not _is_thought(item)]
    return [*head, *plain_messages(messages)]  # type: ignore[misc]


def _is_thought(item: object) -> bool:
    """What an earlier response thought: clients hand back its whole output, and templates leave that out."""
    return isinstance(item, dict) and item.get("type") == "reasoning"


def _message(item: object, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadField(place, "must be a message", "invalid_type")
    if item.get("type", "message") != "message":
        raise BadField(f"{place}.type", "only messages are supported", "unsupported_value")
    for name in item:
        if name not in (*_ITEM_EXTRAS, "role", "content"):
            raise BadField(
                f"{place}.{name}", "unknown field; unknown fields are refused", "unknown_parameter"
            )
    if item.get("role") not in ("user", "system", "developer", "assistant"):
        raise BadField(f"{place}.role", "must be user, system, developer or assistant")
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{place}.content[{i}]") for i, part in enumerate(content)]
    if not isinstance(content, str) and not content:
        raise BadField(f"{place}.content", "must be a string or a list of text parts", "invalid_type")
    return {"role": item["role"], "content": content}


def _part(part: object, place: str) -> dict[str, Any]:
    if (
        not isinstance(part, dict)
        or part.get("type") not in _TEXT_PARTS
        or not isinstance(part.get("text"), str)
    ):
        raise BadField(place, "must be a part of text; others are not supported", "unsupported_value")
    for name, value in part.items():
        if name not in ("type", "text") and (name not in _PART_EXTRAS or value):
            raise BadField(
                f"{place}.{name}", "unknown field; unknown fields are refused", "unknown_parameter"
            )
    return {"type": "text", "text": part["text"]}


def _effort(reasoning: object) -> str | None:
    if reasoning is None:
        return None
    if not isinstance(reasoning, dict):
        raise BadField("reasoning", "must be an object", "invalid_type")
    for name, value in reasoning.items():
        if name != "effort" and value is not None:
            raise BadField(f"reasoning.{name}", "is not supported", "unknown_parameter")
    return effort_in(reasoning.get("effort"), "reasoning.effort")


def _format(text: object) -> dict[str, Any] | None:
    """OpenAI's `text.format` as the `response_format` of a chat."""
    if text is None:
        return None
    if not isinstance(text, dict):
        raise BadField("text", "must be an object", "invalid_type")
    for name, value in text.items():
        if name != "format" and value is not None:
            raise BadField(f"text.{name}", "is not supported", "unknown_parameter")
    form = text.get("format")
    if form is None:
        return None
    if not isinstance(form, dict):
        raise BadField("text.format", "must be an object", "invalid_type")
    if form.get("type") != "json_schema":
        return form
    schema = {name: value for name, value in form.items() if name != "type" and value is not None}
    return {"type": "json_schema", "json_schema": schema}
