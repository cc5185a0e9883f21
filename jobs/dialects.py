"""What SQL says in other words in SQLite and in PostgreSQL: the time, days, lists, INSERTs that may meet a row.

Owns these words, so that no statement elsewhere asks which database it is for. Knows no table and no connection's
life (`database`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import JSON, Connection, Dialect, Double, Integer, String, TypeDecorator, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType

from jobs.moments import DAY_SECONDS

T = TypeVar("T")
PORTION = 500  # ids that one statement names


class now(FunctionElement[float]):  # noqa: N801 - reads as a SQL function
    """Unix seconds on the database's own clock, so that leases do not depend on any worker's."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **kw: Any) -> str:
    # julianday, because SQLite before 3.42 has no unixepoch('subsec').
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::float8"


class unix_day(FunctionElement[int]):  # noqa: N801 - reads as a SQL function
    """The whole days of unix seconds. A cast cuts off on SQLite, which may lack FLOOR, and rounds on PostgreSQL."""

    type = Integer()
    inherit_cache = True


@compiles(unix_day, "sqlite")
def _unix_day_sqlite(element: unix_day, compiler: Any, **kw: Any) -> str:
    return f"CAST({compiler.process(element.clauses, **kw)} / {DAY_SECONDS} AS INTEGER)"


@compiles(unix_day, "postgresql")
def _unix_day_postgresql(element: unix_day, compiler: Any, **kw: Any) -> str:
    return f"CAST(floor({compiler.process(element.clauses, **kw)} / {DAY_SECONDS}) AS INTEGER)"


class Texts(TypeDecorator[Sequence[str]]):
    """A list of strings as one parameter: an array, on SQLite a JSON array."""

    impl = JSON
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        kind: Any = JSON() if dialect.name == "sqlite" else postgresql.ARRAY(String)
        return dialect.type_descriptor(kind)


class is_among(FunctionElement[Any]):  # noqa: N801 - reads as a SQL function
    """`is_among(column, bindparam("ids", type_=Texts))`. Unlike IN it is one statement for any number of them, which
    is read and planned once."""

    type = NullType()  # with Boolean, SQLite would be asked for `… = 1`, for which it searches no index
    inherit_cache = True


@compiles(is_among, "sqlite")
def _is_among_sqlite(element: is_among, compiler: Any, **kw: Any) -> str:
    column, texts = (compiler.process(one, **kw) for one in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({texts}))"


@compiles(is_among, "postgresql")
def _is_among_postgresql(element: is_among, compiler: Any, **kw: Any) -> str:
    column, texts = (compiler.process(one, **kw) for one in element.clauses)
    return f"{column} = ANY ({texts})"


_NOW = select(now())


def clock(connection: Connection) -> float:
    """The database's time, in unix seconds: a value, by which an index is searched. For `now()`, which runs while a
    statement does, PostgreSQL looks at every row."""
    return float(connection.scalars(_NOW).one())


def portions(items: Sequence[T], size: int = PORTION) -> Iterator[Sequence[T]]:
    """The items in their order, as many at a time as one statement should name."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def insert_into(connection: Connection, table: type[DeclarativeBase]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say ON CONFLICT, in the words of this connection's database."""
    if connection.dialect.name == "sqlite":
        return sqlite.Insert(table)
    return postgresql.Insert(table)


def in_words_of(
    build: Callable[[type[sqlite.Insert | postgresql.Insert]], Any],
) -> Callable[[str], Any]:
    """For a statement that is made once per kind of database: `build` is given the INSERT of a dialect that can say
    ON CONFLICT. The result takes the dialect's name."""

    @cache
    def made(dialect: str) -> Any:
        return build(sqlite.Insert if dialect == "sqlite" else postgresql.Insert)

    return made
