"""BadField: one field of what a client sent cannot be honoured, and which, and why.

Owns that refusal, the same for bodies of jobs, batches and schedules and for values beside them, and how a complaint
of pydantic becomes one. Refuses to know what the fields mean.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

# fmt: off
# OpenAI's fields that mean something we cannot do yet: told apart from a typing mistake.
NOT_SUPPORTED_YET = frozenset({
    "audio", "best_of", "echo", "function_call", "functions", "modalities", "moderation", "parallel_tool_calls",
    "prediction", "prompt_cache_options", "reasoning_effort", "stream", "stream_options", "suffix", "tool_choice",
    "tools", "verbosity", "web_search_options",
})
# fmt: on

M = TypeVar("M", bound=BaseModel)


class BadField(ValueError):
    """One field of a body cannot be honoured. `param` is its path, as in `jobs[17].temperature`."""

    def __init__(self, param: str | None, message: str, code: str = "invalid_value") -> None:
        self.param = None if param is None else _printable(param)
        self.message = _printable(message, 1000)
        self.code = code
        super().__init__(f"{self.param}: {self.message}" if self.param else self.message)

    def inside(self, parent: str) -> BadField:
        """The same complaint about a field that lies inside `parent`."""
        return BadField(f"{parent}.{self.param}" if self.param else parent, self.message, self.code)

    def as_error(self) -> dict[str, Any]:
        """As `models.Job.error` stores it."""
        return {"code": self.code, "message": self.message, "param": self.param}


def _printable(text: str, limit: int = 200) -> str:
    """Names come from clients: shortened, and without characters that a response cannot carry."""
    return text[:limit].encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


class Strict(BaseModel):
    """What a client sends as it is: no value is converted, no unknown field passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def validated(kind: type[M], data: object, noun: str = "job") -> M:
    """Raises `BadField` for the first thing that is wrong with `data`."""
    if not isinstance(data, dict):
        raise BadField(None, f"a {noun} must be a JSON object", "invalid_type")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        # An unknown name is the likelier mistake than the missing field that it was meant to be.
        errors.sort(key=lambda one: one["type"] != "extra_forbidden")
        raise _complaint(errors[0]) from None


def _complaint(error: Any) -> BadField:
    kind: str = error["type"]
    path = ""
    for part in error["loc"]:
        if part == "[key]":  # pydantic's mark for a dictionary's key
            break
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if kind == "extra_forbidden":
        name = str(error["loc"][-1])
        known = name in NOT_SUPPORTED_YET and len(error["loc"]) == 1
        message = "this OpenAI field is not supported yet" if known else "unknown field"
        return BadField(path, f"{message}; unknown fields are refused", "unknown_parameter")
    if kind.startswith("one_of:"):
        return BadField(kind.removeprefix("one_of:"), error["msg"])
    if kind == "missing":
        return BadField(path, "is required", "missing_required_parameter")
    if kind == "string_unicode":
        return BadField(path or None, "must be valid Unicode, without lone surrogates")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return BadField(path or None, in_plain_words(error["msg"]), code)


def in_plain_words(message: str) -> str:
    """What pydantic says of a value, to be read behind the field's name."""
    message = message.partition(", unable to parse")[0]  # which says the same once more
    # behind a check of ours pydantic does not know that it counts characters
    if message.startswith("Value should have"):
        message = message.partition(" after validation")[0].replace(" item", " character")
    message = message[0].lower() + message[1:]
    for theirs in ("input", "string", "list", "dictionary", "value"):
        message = message.replace(f"{theirs} should", "must")
    return message.replace(" after validation", "")
