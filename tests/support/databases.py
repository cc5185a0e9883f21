"""Fresh, migrated databases for the tests, on SQLite and PostgreSQL alike.

Owns one migrated template of each kind and cheap copies of it: a file copy, and CREATE DATABASE … TEMPLATE. The
migrations run once per kind and session, through the same function that `nightpress migrate` calls.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.engine import make_url

from migrations.schema import upgrade
from tests.support.servers import libpq

KINDS = ("sqlite", "postgresql")
# For a test whose database could be any; above it.
ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


class Databases:
    """`admin_url`: a PostgreSQL database from which others may be created and dropped."""

    def __init__(self, folder: Path, admin_url: str) -> None:
        self.folder = folder
        self.admin_url = admin_url
        self._serial = itertools.count()
        self._templates: dict[str, str] = {}
        self._admin: psycopg.Connection[Any] | None = None  # kept: to connect costs as much as a database

    @contextmanager
    def fresh(self, kind: str, *, migrated: bool = True) -> Iterator[str]:
        """SQLAlchemy URL of a database that nobody else uses; gone afterwards."""
        name = f"nightpress_test_{os.getpid()}_{next(self._serial)}"
        template = self._template(kind) if migrated else None
        url = self._create(kind, name, template)
        try:
            yield url
        finally:
            self._drop(kind, name)

    def close(self) -> None:
        for kind, name in self._templates.items():
            self._drop(kind, name)
        self._templates.clear()
        if self._admin is not None:
            self._admin.close()

    def _template(self, kind: str) -> str:
        if kind not in self._templates:
            name = f"nightpress_test_{os.getpid()}_template"
            upgrade(self._create(kind, name, None))
            self._templates[kind] = name
        return self._templates[kind]

    def _create(self, kind: str, name: str, template: str | None) -> str:
        if kind == "sqlite":
            path = self._file(name)
            if template is not None:  # closed properly, so there is no write-ahead log beside it
                shutil.copyfile(self._file(template), path)
            return f"sqlite:///{path}"
        command = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        self._administer(command.format(sql.Identifier(name), sql.Identifier(template or "template0")))
        return make_url(self.admin_url).set(database=name).render_as_string(hide_password=False)

    def _drop(self, kind: str, name: str) -> None:
        if kind == "sqlite":
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self._file(name)}{suffix}").unlink(missing_ok=True)
        else:
            self._administer(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.sqlite3"

    def _administer(self, command: sql.Composed) -> None:
        if self._admin is None or self._admin.closed:
            self._admin = psycopg.connect(libpq(self.admin_url), autocommit=True)
        self._admin.execute(command)


def let_write(url: str, allowed: bool) -> None:
    """Whether those who connect to this PostgreSQL database from now on may write to it: not, as on a standby."""
    command = sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}")
    ours = "-c default_transaction_read_only=off"
    with psycopg.connect(libpq(url), autocommit=True, options=ours) as connection:
        name = sql.Identifier(str(make_url(url).database))
        connection.execute(command.format(name, sql.Literal("off" if allowed else "on")))
