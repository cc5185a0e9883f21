"""BulkInsert: many rows into one table by one statement of the driver's own.

Owns the statement and how values travel. A general INSERT spends ten times as long on each row's parameters as the
database does on the row, so here all rows go in at once: into PostgreSQL by COPY in its text format, into SQLite as a
long VALUES, during which Python's lock is let go of once and not for each row. Values must be what the columns hold:
strings, numbers, None, and for JSON columns anything that JSON can say (`jobs.json_text`). Refuses to know which
table and what the rows mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Any, NamedTuple

from sqlalchemy import JSON, BigInteger, Connection, Double, Integer, String, Table

from jobs.database import copy_in
from jobs.dialects import portions
from jobs.json_text import written

_ROWS_OF_VALUES = 200  # SQLite allows 32,766 parameters

Column = Sequence[Any]  # the values of all rows


class Spelled(NamedTuple):
    """Columns in the words of one kind of database: plain values on SQLite, and on PostgreSQL one column of texts,
    each with the values of all `names` in a row."""

    names: tuple[str, ...]
    columns: tuple[Column, ...]


def bulk_insert(connection: Connection, table: Table, columns: Mapping[str, Column]) -> None:
    """Insert rows given by column, all of one length. Columns that are missing get NULL or the server's default.
    Raises as `Connection.execute` does."""
    insert_spelled(connection, table, spelled(connection.dialect.name, table, columns))


def spelled(dialect: str, table: Table, columns: Mapping[str, Column]) -> Spelled:
    """For `insert_spelled`: what can be done before a transaction."""
    if dialect == "sqlite":
        return Spelled(tuple(columns), tuple(_plain(table, name, columns[name]) for name in columns))
    rows = zip(*(_texts(table, name, columns[name]) for name in columns), strict=True)
    return Spelled(tuple(columns), (["\t".join(row) for row in rows],))


def insert_spelled(connection: Connection, table: Table, *parts: Spelled) -> None:
    """Insert rows whose columns lie in several parts. Raises as `Connection.execute` does."""
    names = tuple(chain.from_iterable(part.names for part in parts))
    columns = tuple(chain.from_iterable(part.columns for part in parts))
    if connection.dialect.name == "sqlite":
        for some in portions(list(zip(*columns, strict=True)), _ROWS_OF_VALUES):
            connection.exec_driver_sql(_sqlite(table, names, len(some)), tuple(chain.from_iterable(some)))
    else:
        rows = ["\t".join(row) + "\n" for row in zip(*columns, strict=True)]
        copy_in(connection, f"COPY {table.name} ({_listed(names)}) FROM STDIN", "".join(rows))


@lru_cache(maxsize=256)
def _sqlite(table: Table, names: tuple[str, ...], num_rows: int) -> str:
    row = f"({', '.join('?' * len(names))})"
    return f"INSERT INTO {table.name} ({_listed(names)}) VALUES {', '.join([row] * num_rows)}"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)


@cache
def _kind(table: Table, name: str) -> str:
    kind = table.c[name].type
    for known, word in (
        (JSON, "json"),
        (String, "text"),
        (BigInteger, "bigint"),
        (Integer, "integer"),
        (Double, "float8"),
    ):
        if isinstance(kind, known):
            return word
    raise TypeError(f"{table.name}.{name} is of a kind that is not inserted in bulk: {kind}")


def _plain(table: Table, name: str, values: Column) -> Column:
    return _each(values, _text) if _kind(table, name) == "json" else values


def _texts(table: Table, name: str, values: Column) -> list[str]:
    kind = _kind(table, name)
    spell = _json if kind == "json" else _escaped if kind == "text" else repr
    return ["\\N" if one is None else one for one in _each(values, spell)]


def _each(values: Column, spell: Callable[[Any], str]) -> list[str | None]:
    """None stays None; a value that all rows share is spelled once."""
    if values and values.count(values[0]) == len(values):
        return [None if values[0] is None else spell(values[0])] * len(values)
    return [None if value is None else spell(value) for value in values]


def _text(value: Any) -> str:
    return str(written(value))  # the driver takes its time over a kind of string that it does not know


def _json(value: Any) -> str:
    return written(value).replace("\\", "\\\\")  # it holds no other character that COPY knows


def _escaped(text: str) -> str:
    """As COPY's text format wants it (https://www.postgresql.org/docs/current/sql-copy.html)."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
