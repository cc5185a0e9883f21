"""Strict JSON: what RFC 8259 leaves open is refused, the same for HTTP bodies and for lines of files.

Owns one function. Duplicate names, NaN and Infinity are refused, since two readers of such a text may disagree about
what it says; so is nesting deeper than `MAX_DEPTH`, before anybody walks through it.
"""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

MAX_DEPTH: Final = 256  # of arrays and objects; a JSON Schema of 100 levels needs some 200


class BadJson(ValueError):
    """The message goes on after a subject: "the body" or "line 7"."""


def parse(raw: bytes) -> Any:
    """The one value that `raw` holds as JSON in UTF-8. Raises `BadJson`."""
    try:
        value = _DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        raise BadJson(f"is not valid UTF-8 at byte {error.start}") from None
    except BadJson:
        raise
    except json.JSONDecodeError as error:
        place = f"at line {error.lineno} column {error.colno}"
        raise BadJson(f"is not valid JSON: {error.msg} {place}") from None
    except RecursionError:
        raise BadJson("is nested too deeply") from None
    except ValueError:  # an integer of more digits than Python converts
        raise BadJson("holds a number that is too long") from None
    # Whoever opens few brackets cannot be deep: most texts need no second look.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and isinstance(value, (dict, list)) and _is_deep(value):
        raise BadJson("is nested too deeply")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]  # the arrays and objects of one depth
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise BadJson(f"has the name {name[:80]!a} twice in one object")
            seen.add(name)
    return made


def _constant(name: str) -> NoReturn:
    raise BadJson(f"holds {name}, which is not JSON")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
