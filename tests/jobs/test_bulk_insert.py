"""What goes in by column comes out as it was, whatever characters it is made of; refusals are the database's."""

from __future__ import annotations

from typing import Any, cast

import pytest
from sqlalchemy import Table, func, select
from sqlalchemy.exc import IntegrityError

from jobs.bulk_insert import bulk_insert
from jobs.database import Database
from jobs.json_text import JsonText, written
from jobs.models import Job, Worker

JOBS = cast(Table, Job.__table__)
TEXTS = [
    "",
    "NULL",
    "null",
    '"',
    "\\",
    '\\"',
    "{a,b}",
    "a,b",
    " spaces ",
    "line\nbreak\ttab",
    "é 😀 \u2028",
    "%s ?",
]
SAME = ("source", "state", "model", "tenant")


def columns(texts: list[str | None]) -> dict[str, list[Any]]:
    count = len(texts)
    return {
        "id": [f"job-{index:03}" for index in range(count)],
        "custom_id": texts,
        "body": [{"text": text, "nul": "\x00", "list": [1, None, True]} for text in texts],
        "metadata": [written({"quote": '"'})] * count,
        "retry": [None] * count,
        "error": [None if index % 2 else {"message": text} for index, text in enumerate(texts)],
        "seed": [2**63 - 1 - index for index in range(count)],
        "prefix_group": [-index for index in range(count)],
        "fair_tag": [0.1 * index for index in range(count)],
        "created_at": [1.7e9 + 1e-6] * count,
        **{name: ["same"] * count for name in SAME},
        **{name: [0] * count for name in ("position", "fence", "crashes", "tier")},
    }


def test_values_come_back_as_they_were(database: Database) -> None:
    given = columns([*TEXTS, None])
    with database.write() as connection:
        bulk_insert(connection, JOBS, given)
    with database.read() as connection:
        rows = connection.execute(select(*JOBS.columns).order_by(Job.id)).mappings().all()
    expected = given | {"metadata": [{"quote": '"'}] * len(rows)}
    assert {name: [row[name] for row in rows] for name in given} == expected
    assert {row["priority"] for row in rows} == {0}  # the server's default of a column that was not given
    assert {row["started_at"] for row in rows} == {None}


def test_json_is_stored_as_it_was_written_and_null_stays_null(database: Database) -> None:
    with database.write() as connection:
        bulk_insert(connection, JOBS, columns(["a", "b"]))
        text = select(func.length(JOBS.c.metadata.cast(JOBS.c.custom_id.type))).limit(1)
        assert connection.scalar(text) == len(written({"quote": '"'}))
        assert connection.scalar(select(func.count()).where(JOBS.c.error.is_(None))) == 1


def test_what_cannot_go_in_changes_nothing(database: Database) -> None:
    with database.write() as connection:
        bulk_insert(connection, JOBS, columns(["a"]))
    with pytest.raises(IntegrityError), database.write() as connection:
        bulk_insert(connection, JOBS, columns(["b", "c"]) | {"id": ["job-001", "job-000"]})
    with pytest.raises(IntegrityError), database.write() as connection:
        bulk_insert(connection, JOBS, columns(["b"]) | {"id": ["job-1"], "batch_id": ["no-such-batch"]})
    table = Worker.metadata.tables["checkpoints"]
    with pytest.raises(TypeError, match=r"checkpoints\.growth"), database.write() as connection:
        bulk_insert(connection, table, {"growth": [b"bytes"]})
    with database.read() as connection:
        assert connection.scalars(select(Job.custom_id)).all() == ["a"]


def test_what_is_written_is_not_written_again() -> None:
    text = written({"a": "é"})
    assert text == '{"a": "\\u00e9"}'
    assert written(text) is text
    assert type(text) is JsonText
    assert written("plain") == '"plain"'
