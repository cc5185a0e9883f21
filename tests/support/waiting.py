"""Waiting on conditions: the only sleep in the tests.

A condition is looked at often and for a limited time; a test never guesses how long something takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], what: str, timeout: float = 10.0, *, interval: float = 0.02) -> T:
    """Return the first true value of `predicate`. Raises AssertionError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:g} s (last value: {value!r})")
        time.sleep(interval)
