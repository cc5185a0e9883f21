"""Tenants and keys come to a database that was in use: everything stays, belongs to `default`, and is counted."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, text

from jobs.database import Database
from jobs.dialects import now
from jobs.tallies import used
from jobs.tenants import DEFAULT, Tenants
from migrations import downgrade, upgrade

BODY = json.dumps({"prompt": "NUL \x00 and ☾ in a prompt", "model": "tiny"})
OUTPUTS = json.dumps([{"index": 0, "text": "made ☾", "finish_reason": "stop", "stop_reason": None}])


def insert(connection: Connection, table: str, **values: Any) -> None:
    names = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({places})"), values)  # names are ours


def insert_job(connection: Connection, **values: Any) -> None:
    """A job, beside the `values` as 0001 has it."""
    plain = {"model": "tiny", "body": BODY, "metadata": "{}", "seed": 1, "tier": 2, "fair_tag": 0.0}
    plain |= {"tenant": DEFAULT, "prefix_group": 0, "fence": 1, "crashes": 0, "created_at": 1.0}
    insert(connection, "jobs", **plain, **values)


def fill(connection: Connection) -> None:
    """A batch with a job that waits, one that runs, one that is being stopped and one that is done, as 0001 has them,
    billed today and long ago."""
    time_now = connection.scalar(now())
    insert(
        connection,
        "batches",
        id="b",
        tenant=DEFAULT,
        state="in_progress",
        endpoint="/v1/jobs",
        total=4,
        metadata="{}",
        created_at=1.0,
    )
    for position, state in enumerate(("queued", "in_progress", "cancelling", "completed")):
        place = {"batch_id": "b", "position": position}
        insert_job(connection, id=f"job_{state}", source="http", state=state, **place)
    insert(
        connection,
        "results",
        job_id="job_completed",
        outputs=OUTPUTS,
        prompt_tokens=3,
        completion_tokens=4,
        cached_tokens=0,
        created_at=time_now,
    )
    for fence, (kind, created_at) in enumerate(
        [("billed", time_now), ("wasted", time_now), ("billed", time_now - 2 * 86_400)]
    ):
        insert(
            connection,
            "ledger",
            job_id="job_completed",
            fence=fence,
            kind=kind,
            tenant=DEFAULT,
            model="tiny",
            prompt_tokens=3,
            completion_tokens=4,
            cached_tokens=0,
            created_at=created_at,
        )


def rows(database: Database) -> dict[str, list[Any]]:
    """What 0001 knew, in its words."""
    queries = {
        "batches": "SELECT id, tenant, state, total FROM batches ORDER BY id",
        "jobs": "SELECT id, tenant, batch_id, position, CAST(body AS TEXT), seed, state FROM jobs ORDER BY id",
        "results": "SELECT job_id, CAST(outputs AS TEXT), prompt_tokens, completion_tokens FROM results",
        "ledger": "SELECT job_id, fence, kind, tenant, prompt_tokens FROM ledger ORDER BY fence",
    }
    with database.read() as connection:
        return {name: [tuple(row) for row in connection.execute(text(q))] for name, q in queries.items()}


def test_what_was_there_stays_and_is_counted(empty_database_url: str) -> None:
    upgrade(empty_database_url, "0001")
    database = Database(empty_database_url)
    database.transact(fill)
    before = rows(database)
    upgrade(empty_database_url)
    assert rows(database) == before
    (tenant,) = Tenants(database).all()
    assert (tenant.id, tenant.weight, tenant.quotas) == (DEFAULT, 1.0, {})
    with database.read() as connection:
        use = used(connection, DEFAULT)
        keys = connection.scalars(text("SELECT count(*) FROM jobs WHERE key_id IS NOT NULL")).one()
        estimates = connection.scalars(text("SELECT estimated_tokens FROM jobs ORDER BY id")).all()
    estimate = len(BODY) // 4 + 1024
    assert (use.queued_jobs, use.queued_tokens) == (3, 3 * estimate)
    assert use.stored_bytes == 4 * len(BODY) + len(OUTPUTS)
    assert use.tokens_per_day == 7
    assert keys == 0
    assert list(estimates) == [estimate, 0, estimate, estimate]
    downgrade(empty_database_url, "0001")
    assert rows(database) == before
    upgrade(empty_database_url)
    assert rows(database) == before
    database.close()


def test_a_terminal_state_still_cannot_change(empty_database_url: str) -> None:
    """SQLite drops the triggers of a table that a migration builds anew; this one builds none anew."""
    upgrade(empty_database_url)
    database = Database(empty_database_url)
    with database.read() as connection:
        query = (
            "SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND name = 'jobs_terminal_is_final'"
            if database.is_sqlite
            else "SELECT count(*) FROM pg_trigger WHERE tgname = 'jobs_terminal_is_final'"
        )
        assert connection.scalars(text(query)).one() == 1
    database.close()
