"""Schema: Alembic, called from Python. Owns the lock and the transaction around a migration.

There is no alembic.ini: the scripts lie beside this file, and the database comes from `jobs.settings` or from
the caller. All of an upgrade is one transaction on both databases, so a crash leaves the old shape. Several
processes may call it at once: one works, the others wait and then find nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from jobs.database import Database

_LOCK = 0x6E69676874  # "night": names our advisory lock in PostgreSQL
_PATIENCE_SECONDS = 120.0  # how long to wait for another process's migration


class TooNew(RuntimeError):
    """A version of this code that came later has made the database."""

    def __init__(self, revision: str) -> None:
        super().__init__(
            f"the database was made by a newer version (its shape is {revision}): run that one, or restore a backup"
        )


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database at `url` (SQLAlchemy's spelling) to `revision`. Repeating it changes nothing. Raises
    `TooNew`."""
    _in_transaction(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str = "base") -> None:
    """Take the database back to `revision`; `base` leaves no table of ours. Deletes what they hold."""

    def work(config: Config) -> None:
        command.downgrade(config, revision)
        if revision == "base":
            config.attributes["connection"].execute(text("DROP TABLE alembic_version"))

    _in_transaction(url, work)


def misfit(database: Database) -> str | None:
    """None when the database has the shape that this version of the code was written for, else what is to be done."""
    try:
        with database.read() as connection:
            revision = _known_revision(connection)
    except TooNew as error:
        return str(error)
    if revision == ScriptDirectory.from_config(alembic_config()).get_current_head():
        return None
    return "the database has another shape than this version needs: run `nightpress migrate`"


def _known_revision(connection: Connection) -> str | None:
    """None of an empty database. Raises `TooNew`."""
    revision = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(alembic_config()).walk_revisions()
    if revision is not None and revision not in {script.revision for script in scripts}:
        raise TooNew(revision)
    return revision


def _in_transaction(url: str, work: Callable[[Config], None]) -> None:
    database = Database(url, pool_size=1)

    def run(connection: Connection) -> None:
        if not database.is_sqlite:  # SQLite's BEGIN IMMEDIATE is this lock already
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        _known_revision(connection)
        work(alembic_config(connection))

    try:
        database.transact(run, patience=_PATIENCE_SECONDS)
    finally:
        database.close()


def alembic_config(connection: Connection | None = None) -> Config:
    """For `alembic`'s own commands. Without a connection, env.py opens the configured database."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config
