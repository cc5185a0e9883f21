"""Database: one SQLAlchemy engine and two kinds of transaction.

Owns connections, SQLite's settings and the retry of transactions that the database refused for a passing
reason (lock, deadlock, serialization, a connection that dropped or may only read). Knows no table. Every
transaction given to `transact` must be safe to run twice, because a lost connection leaves it unknown whether
the commit happened: all writes here are conditional on a fence, a state or a primary key, so a second run
changes nothing.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.orm import InstrumentedAttribute

from jobs.json_text import written

log = logging.getLogger(__name__)
T = TypeVar("T")

IDLE_SECONDS = 0.2  # after which a connection is asked whether it still lives
# Of SQLite's log, 32 MB. Whoever commits when it is full copies it back first; at SQLite's own 1,000 pages every
# sixth claim of 64 jobs did, and what is written to often was copied each time.
CHECKPOINT_PAGES = 8_000
BUSY_SECONDS = 30.0  # how long SQLite waits for another writer
# A peer that froze or vanished must not hold anybody for longer than a lease or two.
POSTGRES_ARGUMENTS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
    "options": "-c lock_timeout=10s -c idle_in_transaction_session_timeout=30s",
}
READ_ONLY_SQLSTATE = "25006"
TRANSIENT_SQLSTATES = {"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "53300"}


class Database:
    """Raises `sqlalchemy.exc.SQLAlchemyError` subclasses; `transact` only after its patience has run out. No thread
    may begin to write within a transaction that writes. A folder made for an SQLite file is its owner's alone, for
    prompts are in it. `read_only`: the file is not made, nor changed."""

    def __init__(self, url: str, *, pool_size: int = 8, read_only: bool = False) -> None:
        self.url = url
        parsed = make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        # SQLite lets one writer in and has the others ask again and again; here they queue
        self._writing: AbstractContextManager[Any] = threading.Lock() if self.is_sqlite else nullcontext()
        if self.is_sqlite and read_only:
            path = quote(str(Path(str(parsed.database)).absolute()))
            self.engine: Engine = create_engine(
                f"sqlite:///file:{path}?mode=ro&uri=true", hide_parameters=True
            )
        elif self.is_sqlite:
            if parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.engine = create_engine(
                url,
                connect_args={"timeout": BUSY_SECONDS},
                hide_parameters=True,
                json_serializer=written,
            )
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = create_engine(
                url,
                pool_size=pool_size,
                max_overflow=pool_size,
                pool_use_lifo=True,  # the same few, which know our statements already
                hide_parameters=True,  # prompts do not belong in a log
                json_serializer=written,
                connect_args=POSTGRES_ARGUMENTS,
            )
            event.listen(self.engine, "connect", _note_use)
            event.listen(self.engine, "checkin", _note_use)
            event.listen(self.engine, "checkout", self._ping_if_idle)
            event.listen(self.engine, "handle_error", _leave_reader)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that writes; on SQLite it takes the write lock at once (BEGIN IMMEDIATE)."""
        with (
            self._writing,
            self.engine.connect().execution_options(nightpress_write=True) as connection,
            connection.begin(),
        ):
            yield connection

    def transact(self, work: Callable[[Connection], T], *, patience: float = 30.0) -> T:
        """Run `work` in a write transaction, again while the database refuses it for a passing reason."""
        deadline = time.monotonic() + patience
        delay = 0.02
        while True:
            try:
                with self.write() as connection:
                    return work(connection)
            except DBAPIError as error:
                if not is_transient(error) or time.monotonic() + delay > deadline:
                    raise
                log.warning("database.retry delay=%.2f error=%s", delay, reason_of(error))
                time.sleep(delay * (0.5 + random.random()))
                delay = min(delay * 2, 1.0)

    def close(self) -> None:
        self.engine.dispose()

    def _ping_if_idle(self, connection: Any, record: Any, proxy: Any) -> None:
        """One that was in use just now lives: to ask it each time would cost as much as a short transaction."""
        if time.monotonic() - record.info["used"] < IDLE_SECONDS:
            return
        try:
            self.engine.dialect.do_ping(connection)
        except self.engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error  # the pool takes another


def was_committed(connection: Connection, key: InstrumentedAttribute[str], made: str) -> bool:
    """Whether the row that this transaction makes is there: then it ran before and was committed, and only the answer
    got lost. `made`: the row's id, from before the transaction."""
    return connection.execute(select(key).where(key == made)).first() is not None


def commit_lazily(connection: Connection) -> None:
    """Let this transaction's commit return before it is on disk. PostgreSQL may then lose it with its power, but none
    before it, and nothing that builds on it and waited for the disk itself: what comes next must look whether it is
    there. On SQLite this changes nothing."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def copy_in(connection: Connection, statement: str, text: str) -> None:
    """PostgreSQL's COPY … FROM STDIN, whose data is `text`. Raises as `Connection.execute` does."""
    driver: Any = connection.connection.driver_connection
    dialect = connection.dialect
    errors = dialect.loaded_dbapi.Error
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            copy.write(text)
    except errors as error:
        reader = _refused_by_reader(statement, error)
        lost = reader is not None or dialect.is_disconnect(error, driver, None)
        if lost:
            connection.invalidate(error)
        raise reader or DBAPIError.instance(
            statement, None, error, errors, hide_parameters=True, connection_invalidated=lost, dialect=dialect
        ) from error


def reason_of(error: BaseException) -> str:
    """What the driver says, in one line. It names servers, and what was to be stored only where that is at fault."""
    lines = str(getattr(error, "orig", None) or "").strip().splitlines()
    return lines[0] if lines else type(error).__name__


def cause(error: BaseException) -> str:
    """For a log, where no prompt has a place: what kind of error it is, and the reason only of one that concerns the
    database or the disk as a whole (away, full, locked), since others may show what was to be stored."""
    reason = reason_of(error) if isinstance(error, OperationalError) else getattr(error, "strerror", None)
    return type(error).__name__ + (f" reason={reason!a}" if reason else "")


def is_transient(error: DBAPIError) -> bool:
    """True when the same transaction may well succeed if it is run again."""
    if error.connection_invalidated:
        return True
    if getattr(error.orig, "sqlstate", None) in TRANSIENT_SQLSTATES:
        return True
    text = str(error.orig)
    if "database is locked" in text or "database table is locked" in text:
        return True
    # A PostgreSQL that cannot be reached raises before there is a connection to invalidate.
    return isinstance(error, OperationalError) and type(error.orig).__module__.startswith("psycopg")


def _refused_by_reader(statement: str | None, error: BaseException | None) -> OperationalError | None:
    """Of a session that may only read, as all of a standby's: no database that anybody could use, for now."""
    if error is None or getattr(error, "sqlstate", None) != READ_ONLY_SQLSTATE:
        return None
    return OperationalError(statement, None, error, hide_parameters=True, connection_invalidated=True)


def _leave_reader(context: ExceptionContext) -> OperationalError | None:
    """Whether a session may write is settled when it begins, so neither it nor any that is as old is used again."""
    reader = _refused_by_reader(context.statement, context.original_exception)
    context.is_disconnect |= reader is not None
    return reader


def _note_use(connection: Any, record: Any) -> None:
    record.info["used"] = time.monotonic()


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an accepted job survives a power cut
    cursor.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A read that later writes would fail at once with SQLITE_BUSY_SNAPSHOT, so writers lock first.
    writes = connection.get_execution_options().get("nightpress_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
