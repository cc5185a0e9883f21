"""OpenAI's bodies of chat and text completions, turned into jobs, for HTTP and for batch files alike.

Owns which of OpenAI's fields are honoured, which change nothing here, and which values of the others mean "off"; what
is left must be a `JobBody`, which refuses the rest by name. Refuses to know who asked and how the answer is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from jobs.bad_field import NOT_SUPPORTED_YET, BadField
from jobs.body import JobBody, parse_job, read_job
from jobs.settings import Settings
from jobs.template_kwargs import EFFORT, effort_in, with_effort

Url: TypeAlias = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
COMPLETION_TOKENS: Final = 16  # OpenAI's default of /v1/completions
MAX_COMPLETION_LOGPROBS: Final = 5

# fmt: off
# Fields that change nothing here.
IGNORED: Final = frozenset({
    "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
})
# Values that ask for nothing.
OFF: Final[dict[str, tuple[Any, ...]]] = {
    "stream": (False,), "echo": (False,), "tools": ([],), "tool_choice": ("none", "auto"), "best_of": (1,),
    "suffix": ("",), "functions": ([],), "function_call": ("none",), "parallel_tool_calls": (False, True),
    "modalities": (["text"],), "reasoning_effort": ("none",),
}
# What clients copy into a conversation from answers that had none of it.
MESSAGE_EXTRAS: Final = frozenset({
    "annotations", "audio", "function_call", "name", "refusal", "tool_calls",
})
# What earlier answers thought, which templates leave out of a conversation; our name of it, and vLLM's.
THOUGHTS: Final = ("reasoning_content", "reasoning")
# fmt: on
_SPECIAL: Final = IGNORED | OFF.keys() | NOT_SUPPORTED_YET


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request. `store`: the client says that it will come back for the answer."""

    url: Url
    body: JobBody
    stream: bool = False
    include_usage: bool = False
    store: bool = False


def read_asked(
    url: Url,
    given: Mapping[str, Any],
    settings: Settings,
    *,
    may_stream: bool,
    custom_id: str | None = None,
    checked: bool = False,
) -> Asked:
    """`custom_id`: what came beside `given`. `checked`: this very request has been read before, so its shape alone is
    looked at. Raises `BadField` for the first thing that is wrong or cannot be honoured."""
    rest = dict(given)
    for name in _SPECIAL.intersection(rest):
        if name in IGNORED or is_off(name, rest[name]):
            del rest[name]
    wanted, other = ("messages", "prompt") if url == CHAT else ("prompt", "messages")
    for name in (other, "custom_id"):
        if name in rest:
            raise BadField(name, f"is not a field of {url}", "unknown_parameter")
    if rest.get(wanted) is None:
        raise BadField(wanted, "is required", "missing_required_parameter")
    stream, include_usage = _stream_of(rest) if may_stream else (False, False)
    if url == CHAT:
        rest["messages"] = plain_messages(rest["messages"])
        if (effort := effort_in(rest.pop(EFFORT, None), EFFORT)) is not None:
            rest["chat_template_kwargs"] = with_effort(rest.get("chat_template_kwargs"), effort)
    else:
        _completion_fields(rest)
    if not may_stream and "stream" in rest:
        raise BadField("stream", "a batch answers in a file and cannot stream; leave it out or give false")
    if custom_id is not None:
        rest["custom_id"] = custom_id
    body = read_job(rest) if checked else parse_job(rest, settings)
    if stream and body.logprobs:
        raise BadField("logprobs", "cannot be had together with stream", "unsupported_parameter")
    return Asked(
        url=url,
        body=body,
        stream=stream,
        include_usage=include_usage,
        store=given.get("store") is True,
    )


def is_off(name: str, value: object) -> bool:
    """Whether a field that we do not have is given a value that asks for nothing."""
    return is_one_of(value, OFF.get(name, ())) or (value is None and name in NOT_SUPPORTED_YET)


def is_one_of(value: object, known: tuple[Any, ...]) -> bool:
    """Equal in JSON, where 0 is not false."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known)


def plain_messages(messages: object) -> object:
    """Messages with roles that templates know, without what is empty in them, and without thoughts."""
    if not isinstance(messages, list):
        return messages
    return [_plain(message) if isinstance(message, dict) else message for message in messages]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    extras = MESSAGE_EXTRAS.intersection(message)
    plain = {name: value for name, value in message.items() if name not in extras or value}
    for name in THOUGHTS:
        if isinstance(plain.get(name), str | None):
            plain.pop(name, None)
    if plain.get("role") == "developer":  # OpenAI's newer word
        plain["role"] = "system"
    return plain


def _stream_of(rest: dict[str, Any]) -> tuple[bool, bool]:
    """(stream, include_usage), taken out of `rest`."""
    stream, options = rest.pop("stream", None), rest.pop("stream_options", None)
    if stream is not None and not isinstance(stream, bool):
        raise BadField("stream", "must be true or false", "invalid_type")
    if options is None:
        return bool(stream), False
    if not stream:
        raise BadField("stream_options", "needs stream to be true")
    if not isinstance(options, dict):
        raise BadField("stream_options", "must be an object", "invalid_type")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation"):
            allowed = "include_usage and include_obfuscation"
            raise BadField(
                f"stream_options.{name}", f"unknown field; there are {allowed}", "unknown_parameter"
            )
        if value is not None and not isinstance(value, bool):
            raise BadField(f"stream_options.{name}", "must be true or false", "invalid_type")
    return True, bool(options.get("include_usage"))


def _completion_fields(rest: dict[str, Any]) -> None:
    """What /v1/completions spells in its own way, as a chat spells it."""
    prompt = rest["prompt"]
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise BadField(
                "prompt",
                "must be one string; token ids, and several prompts in one request, are not supported",
                "unsupported_value",
            )
        rest["prompt"] = prompt[0]
    if rest.get("max_tokens") is None and rest.get("max_completion_tokens") is None:
        least = rest.get("min_tokens")
        rest["max_tokens"] = max(COMPLETION_TOKENS, least) if isinstance(least, int) else COMPLETION_TOKENS
    number = rest.get("logprobs")
    if not isinstance(number, int) or isinstance(number, bool):
        return
    if not 0 <= number <= MAX_COMPLETION_LOGPROBS:
        raise BadField("logprobs", f"must be a number from 0 to {MAX_COMPLETION_LOGPROBS}, true or false")
    if "top_logprobs" in rest:
        raise BadField("top_logprobs", "goes with logprobs as true; a number says both")
    rest |= {"logprobs": True, "top_logprobs": number}
