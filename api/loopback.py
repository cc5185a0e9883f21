"""Loopback: which addresses and names mean this machine and nobody else, and how one is written. Asks no resolver."""

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


def address_of(host: str, port: int) -> str:
    """As a URL, in which an IPv6 address has brackets."""
    host = host.strip("[]")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
