"""LoadProgress: how far the reading of the weights has come, shown to whoever waits.

Owns the choice between a bar, for a person at a terminal, and two log lines, for everybody else. Knows bytes and
seconds, no tensors.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

logger = logging.getLogger(__name__)


class LoadProgress:
    """Use as a context. `bar`: show one on stderr if that is a terminal."""

    def __init__(self, path: Path, num_bytes: int, *, bar: bool) -> None:
        from tqdm import tqdm

        self._path = path
        self._num_bytes = num_bytes
        self._tqdm = tqdm(
            total=num_bytes, desc="Loading", unit="B", unit_scale=True, disable=None if bar else True
        )

    def __enter__(self) -> LoadProgress:
        if self._tqdm.disable:
            logger.info("loading %s, %.0f MB", self._path, self._num_bytes / 1e6)
        self._started = time.perf_counter()
        return self

    def advance(self, num_bytes: int) -> None:
        self._tqdm.update(num_bytes)

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        seconds = time.perf_counter() - self._started
        if self._tqdm.disable and failure is None:
            rate = self._num_bytes / 1e6 / max(seconds, 1e-9)
            logger.info("loaded %.0f MB in %.1f s, %.0f MB/s", self._num_bytes / 1e6, seconds, rate)
        self._tqdm.close()
