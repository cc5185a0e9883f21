"""Audience: who listens to a job while it runs, and what is said to them through Redis.

Owns the Redis Stream of one job: its name, its size and life, and its two words, text and end. All of it may get
lost: who listens asks SQL as well, and knows by the places of texts what is missing. Knows neither the worker that
speaks (`broadcast`) nor the API that listens (`listeners`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

from redis.typing import EncodableT, FieldT

MAX_ENTRIES: Final = 1000  # of one stream; a reader that is further behind finds the rest in SQL
LIFE_SECONDS: Final = 300  # after the last word
_FIELD: Final = "said"


class Audience(IntEnum):
    """As `models.Job.audience` stores it."""

    NOBODY = 0
    END = 1  # somebody waits for the result
    TEXT = 2  # somebody reads along


class Piece(NamedTuple):
    """A part of one sample's text, or of what it thought before. `at`: characters before it."""

    sample: int
    at: int
    text: str
    is_reasoning: bool = False


class Said(NamedTuple):
    """One entry of a stream."""

    pieces: tuple[Piece, ...] = ()
    ended: bool = False


def stream_name(job_id: str) -> str:
    return f"nightpress:stream:{job_id}"


def pieces_entry(pieces: Sequence[Piece]) -> dict[FieldT, EncodableT]:
    return {_FIELD: json.dumps({"pieces": pieces})}


def end_entry() -> dict[FieldT, EncodableT]:
    return {_FIELD: json.dumps({"ended": True})}


def heard(entry: Mapping[Any, Any]) -> Said:
    """What an entry says, with names and values as bytes. One that is not ours says nothing."""
    try:
        said = json.loads(entry[_FIELD.encode()])
        pieces = tuple(
            Piece(int(sample), int(at), str(text), more == [True])
            for sample, at, text, *more in said.get("pieces", ())
        )
        return Said(pieces, said.get("ended") is True)
    except (KeyError, ValueError, TypeError, AttributeError):
        return Said()
