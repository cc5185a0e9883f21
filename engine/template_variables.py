"""TemplateVariables: what a client hands to a chat template beside messages, such as Qwen3's `enable_thinking`.

Owns the names and values that are taken, as vLLM's `chat_template_kwargs`, for bodies of jobs and the Python door
alike. Values are switches, numbers and short words: no text that could spell a control token, nothing to loop over.
Names that the renderer or Jinja gives a meaning are refused, and so are transformers' arguments of
`apply_chat_template`, which are no variables. Refuses to know Jinja and which names a template reads: one that it
does not read changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from engine.invalid_parameter import InvalidParameter

FIELD: Final = "chat_template_kwargs"
MAX_VARIABLES: Final = 16
NAME: Final = "[A-Za-z_][A-Za-z0-9_]{0,63}"
WORD: Final = "[A-Za-z0-9_.-]{1,64}"

# fmt: off
RESERVED: Final = frozenset({
    # the renderer's own
    "messages", "tools", "documents", "add_generation_prompt",
    # functions that every template has
    "cycler", "dict", "joiner", "lipsum", "namespace", "raise_exception", "range", "strftime_now",
    # Jinja's
    "caller", "kwargs", "loop", "self", "super", "varargs",
    # transformers' arguments
    "chat_template", "continue_final_message", "conversation", "max_length", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize",
    "tokenizer_kwargs", "truncation",
})
# fmt: on
_NAME: Final = re.compile(NAME)
_WORD: Final = re.compile(WORD)
_TOKEN: Final = "_token"  # how a tokenizer's own names of its special tokens end

TemplateVariables: TypeAlias = Mapping[str, bool | int | float | str | None]


def check_variables(variables: Mapping[Any, Any]) -> None:
    """Raises `InvalidParameter`, whose `param` is the field, followed by a dot and the key where that is a name."""
    if len(variables) > MAX_VARIABLES:
        raise InvalidParameter(FIELD, f"may have at most {MAX_VARIABLES} names")
    for name, value in variables.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidParameter(
                FIELD,
                f"a name has 1 to 64 letters, digits and _, and begins with no digit; not {name!a:.100}",
            )
        if name in RESERVED or name.endswith(_TOKEN) or "__" in name:
            raise InvalidParameter(f"{FIELD}.{name}", "is a reserved name, which no client may set")
        if not _is_taken(value):
            raise InvalidParameter(
                f"{FIELD}.{name}",
                "must be true, false, null, a finite number (integers of 64 bits) or a word of 1 to 64 letters, "
                "digits, _, . and -: other text could spell a control token",
            )


def _is_taken(value: object) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) and _WORD.fullmatch(value) is not None
