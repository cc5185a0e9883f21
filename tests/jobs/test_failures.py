"""Failures in words, for programs that show them."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.failures import in_words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ({"message": "NaN"}, "x: NaN"),
        ({"message": "NaN", "param": None}, "x: NaN"),
        ({"message": "unknown field", "param": "maxtokens"}, "x: maxtokens: unknown field"),
        ({"message": "min_tokens: too many", "param": "min_tokens"}, "x: min_tokens: too many"),
    ],
)
def test_the_field_is_named_once(error: dict[str, Any], words: str) -> None:
    assert in_words(error | {"code": "x"}) == words
