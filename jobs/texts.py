"""Texts: the kinds of strings that a client may send, for bodies, query strings and schedules alike.

Owns their lengths and which characters they may hold: what no database and no answer could carry is refused. Refuses
to know what the texts are for.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

MAX_CUSTOM_ID_CHARS = 512
MAX_MODEL_CHARS = 255
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512


def _storable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "must be valid Unicode, without lone surrogates") from None
    return text


def _without_nul(text: str) -> str:
    if "\x00" in text:
        raise PydanticCustomError("text", "must not contain NUL characters")
    return text


def _openai_metadata(pairs: dict[str, str]) -> dict[str, str]:
    if len(pairs) > MAX_METADATA_PAIRS:
        raise PydanticCustomError("metadata", f"at most {MAX_METADATA_PAIRS} pairs are allowed")
    for key, value in pairs.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY_CHARS:
            raise PydanticCustomError(
                "metadata", f"each key must have 1 to {MAX_METADATA_KEY_CHARS} characters"
            )
        if len(value) > MAX_METADATA_VALUE_CHARS:
            raise PydanticCustomError(
                "metadata", f"each value may have at most {MAX_METADATA_VALUE_CHARS} characters"
            )
    return pairs


# Where a length is asked for, pydantic itself refuses lone surrogates (`string_unicode`).
Text = Annotated[str, AfterValidator(_storable)]
Name = Annotated[str, AfterValidator(_storable), AfterValidator(_without_nul)]
NonEmptyText = Annotated[str, Field(min_length=1)]
ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARS), AfterValidator(_without_nul)]
CustomId = Annotated[str, Field(min_length=1, max_length=MAX_CUSTOM_ID_CHARS), AfterValidator(_without_nul)]
Metadata = Annotated[dict[Text, Text], AfterValidator(_openai_metadata)]
