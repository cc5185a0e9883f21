"""A service that knows only Redis: a Celery application without one line of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

from celery import Celery

TASK = "nightpress.generate"
QUEUE = "generate"


def celery_url(redis_url: str) -> str:
    """`unix:///path?db=0`, as redis-py writes it, in Celery's spelling; other URLs are the same in both."""
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{unquote(parts.path)}?virtual_host={database}"


@contextmanager
def bare_celery(redis_url: str) -> Iterator[Celery]:
    url = celery_url(redis_url)
    with Celery("somebody-else", broker=url, backend=url, set_as_current=False) as app:
        yield app
        leave_backend(app)


def leave_backend(app: Celery) -> None:
    """Close what its result backend has opened: `client.close()` would leave the connections to its pool, open."""
    app.backend.client.connection_pool.disconnect()
