"""Loopback: which addresses and names mean this machine and nobody else. Asks no resolver."""

from __future__ import annotations

import ipaddress
from functools import lru_cache


@lru_cache(maxsize=256)  # each request asks twice
def is_loopback(host: str) -> bool:
    """True for `localhost` and addresses that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
