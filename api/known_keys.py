"""KnownKeys: API keys as the database has them, a few seconds old at most, and never more than `CACHE_KEYS` of them.

Owns the cache between the gate and the database, and how often a key's use is written down. Keys that do not exist
are not remembered: guessing costs the guesser a query each time, and pushes nobody out. Refuses to know requests.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

from starlette.concurrency import run_in_threadpool

from jobs.keys import USE_SECONDS, FoundKey, Keys

CACHE_SECONDS: Final = 3.0  # a key that was revoked, or the first key, takes effect within so long
CACHE_KEYS: Final = 1024


class KnownKeys:
    """Used from the event loop; only the queries run elsewhere."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._found: OrderedDict[str, tuple[float, FoundKey]] = OrderedDict()  # until when, what
        self._noted: dict[str, float] = {}  # key id → when its use was written down
        self._any: bool | None = None  # None: never asked
        self._none_until = 0.0

    async def any(self, *, fresh: bool) -> bool:
        """Whether keys are needed. While they are not, `fresh` asks the database again."""
        if self._any is None or (fresh and not self._any and time.monotonic() >= self._none_until):
            self._any = await run_in_threadpool(self._keys.any)
            self._none_until = time.monotonic() + CACHE_SECONDS
        return self._any

    async def find(self, key_id: str) -> FoundKey | None:
        until, found = self._found.get(key_id, (0.0, None))
        if found is not None and time.monotonic() < until:
            self._found.move_to_end(key_id)
            return found
        self._found.pop(key_id, None)
        asked = time.monotonic()
        found = await run_in_threadpool(self._keys.find, key_id)
        if found is not None:
            left = found.view.seconds_left
            trusted = CACHE_SECONDS if left is None or left <= 0 else min(CACHE_SECONDS, left)
            self._found[key_id] = (asked + trusted, found)
            while len(self._found) > CACHE_KEYS:
                self._noted.pop(self._found.popitem(last=False)[0], None)
        return found

    async def note_use(self, key_id: str) -> None:
        """Write down, once a minute, that the key is in use."""
        if time.monotonic() - self._noted.get(key_id, -USE_SECONDS) >= USE_SECONDS:
            self._noted[key_id] = time.monotonic()
            await run_in_threadpool(self._keys.note_use, key_id)
