"""A database whose first answer gets lost, as when a connection breaks just after the commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from jobs.database import Database


class LostOnce(Database):
    """Its first write transaction is committed, and then nobody hears of it."""

    lost = False

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with super().write() as connection:
            yield connection
        if not self.lost:
            self.lost = True
            raise DBAPIError("COMMIT", None, Exception("gone"), connection_invalidated=True)
