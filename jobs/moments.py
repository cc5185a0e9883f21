"""Moments: times as people write them, in unix seconds or as a day of UTC. Nothing else."""

from __future__ import annotations

import datetime
import re
from typing import Final

from jobs.bad_field import BadField

DAY_SECONDS: Final = 86_400  # of unix time, so days are UTC's
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_SECONDS: Final = re.compile(r"[0-9]{1,11}(\.[0-9]{1,6})?")
_EPOCH: Final = datetime.date(1970, 1, 1)


def parse_moment(name: str, text: str) -> float:
    """Unix seconds of `1764028800`, `1764028800.5` or `2025-11-25`, which begins at midnight UTC. Raises
    `BadField`."""
    if _DATE.fullmatch(text):
        try:
            return float((datetime.date.fromisoformat(text) - _EPOCH).days * DAY_SECONDS)
        except ValueError:
            pass
    elif _SECONDS.fullmatch(text):
        return float(text)
    raise BadField(name, "must be unix seconds or a date such as 2026-01-31")


def day_text(day: int) -> str:
    """`2025-11-25` of whole days since 1970."""
    return (_EPOCH + datetime.timedelta(days=day)).isoformat()
