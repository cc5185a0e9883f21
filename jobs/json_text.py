"""JsonText: a value in the words in which a JSON column keeps it, written out once and not at every use.

Owns that wording: ASCII, so characters are bytes, with Python's usual spaces. Whoever stores, sends or measures a
value that is written out already takes the text as it is. Refuses to know what the values mean.
"""

from __future__ import annotations

import json
from typing import Any


class JsonText(str):
    """Valid JSON, as `written` makes it."""

    __slots__ = ()


# Our values hold no cycles, so nobody need look for them.
_ENCODE = json.JSONEncoder(check_circular=False).encode


def written(value: Any) -> JsonText:
    """`value`, which must not hold itself, as JSON; what is written out already stays as it is. Raises as
    `json.dumps` does."""
    return value if type(value) is JsonText else JsonText(_ENCODE(value))
