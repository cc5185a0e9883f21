"""Addresses: whether the URL of a database or a broker can be read, asked before anybody connects to it.

Owns the yes or no. A password with a character that ends it too early puts its rest in the place of a host, a port or
a query, and the libraries name what they find there; so whoever asks here says nothing of the URL itself.
"""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

ADVICE = "percent-encode what is no letter or digit in the password, such as / # ? and @ (%2F %23 %3F %40)"


def is_database(url: str) -> bool:
    """Of `sqlite:///…` and `postgresql+psycopg://…`, as SQLAlchemy reads them."""
    from sqlalchemy.engine import make_url  # here, because commands that need no database start without it
    from sqlalchemy.exc import ArgumentError

    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        return False
    if parts.get_backend_name() == "sqlite":
        return True
    return url.count("@") == (0 if parts.username is None else 1)


def is_broker(url: str) -> bool:
    """Of `redis://…`, `rediss://…` and `unix:///…`, as redis-py and kombu read them: all of it in its place, and a
    database that is a number."""
    try:
        parts = urlsplit(url)
        numbers = parse_qs(parts.query).get("db", [])
        if parts.scheme == "unix":
            _, at, host = parts.netloc.rpartition("@")
            placed = bool(parts.path) and not host and (not at or "@" not in parts.path + parts.query)
        else:
            placed = parts.port != 0 and url.count("@") == parts.netloc.count("@")
            numbers.append(parts.path.strip("/") or "0")
    except ValueError:
        return False
    return placed and "#" not in url and all(one.isascii() and one.isdecimal() for one in numbers)
