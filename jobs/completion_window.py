"""Completion windows: how long a submit may take, in OpenAI's words and a few more.

Owns the spelling: OpenAI knows only `24h`; here any whole number of s, m, h or d from one minute to 30 days, and
`background` for work that may take as long as it likes. Nothing else; what follows from a window is `jobs.terms`'s.
"""

from __future__ import annotations

import re
from typing import Final

from jobs.bad_field import BadField
from jobs.terms import Terms, Tier

SHORTEST_SECONDS: Final = 60
LONGEST_SECONDS: Final = 30 * 86_400
BACKGROUND: Final = "background"
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,7})([smhd])")


def window_seconds(window: object) -> float | None:
    """Seconds of a window; None for `background`, which has no end. Raises `BadField`."""
    if window == BACKGROUND:
        return None
    found = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS:
        raise BadField(
            "completion_window",
            "must be a whole number with s, m, h or d behind it, from 60s to 30d, such as 24h; or background",
        )
    return float(seconds)


def terms_of_window(window: object, *, submitted_at: float) -> Terms:
    """What a window that begins at `submitted_at` (unix seconds) asks for. Raises `BadField`."""
    seconds = window_seconds(window)
    if seconds is None:
        return Terms(tier=Tier.BACKGROUND)
    return Terms(deadline=submitted_at + seconds)
