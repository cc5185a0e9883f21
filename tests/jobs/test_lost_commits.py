"""A commit whose answer got lost is tried again: through every door it is no error, and nothing is there twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import func, select, update

from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.database import Database
from jobs.dialects import now
from jobs.files import Files
from jobs.idempotency import Submit
from jobs.intake import Intake
from jobs.leases import register
from jobs.models import Batch, File, Job, Schedule, Worker
from jobs.prices import Prices
from jobs.reads import Reads
from jobs.retries import Retries
from jobs.schedule_body import parse_schedule
from jobs.schedules import Schedules
from jobs.settings import Settings
from jobs.states import JobState
from jobs.tenants import DEFAULT, OPERATOR, Tenants
from tests.support import rows
from tests.support.batch_lines import Bench
from tests.support.invariants import check_tallies
from tests.support.lost_commits import LostOnce

BODY = JobBody(prompt="a", model="tiny")
SCHEDULE = {"name": "nightly", "cron": "0 2 * * *", "jobs": [{"prompt": "a"}]}
Door = Callable[[Database, Settings], Any]
DOORS: dict[str, tuple[Door, dict[str, int]]] = {
    "job with a key": (lambda d, s: Intake(d, s).accept_one(BODY, OPERATOR, Submit.of("k", {})), {"jobs": 1}),
    "jobs": (lambda d, s: Intake(d, s).accept_many([BODY] * 2, OPERATOR), {"jobs": 2, "batches": 1}),
    "schedule": (
        lambda d, s: Schedules(d, s).create(parse_schedule(SCHEDULE, s), OPERATOR),
        {"schedules": 1},
    ),
    "file": (lambda d, s: Bench(d, s).upload(b"{}"), {"files": 1}),
    "batch of a file": (lambda d, s: Bench(d, s).create(1), {"files": 1, "batches": 1}),
}


@pytest.fixture
def forgetful(database: Database) -> Iterator[LostOnce]:
    forgetful = LostOnce(database.url)
    yield forgetful
    assert forgetful.lost
    forgetful.close()


def counts(database: Database) -> dict[str, int]:
    """How many rows each table has that has some."""
    with database.read() as connection:
        check_tallies(connection)
        tables = (Job, Batch, File, Schedule)
        found = {
            table.__tablename__: connection.scalar(select(func.count()).select_from(table)) or 0
            for table in tables
        }
    return {name: count for name, count in found.items() if count}


@pytest.mark.parametrize("door", sorted(DOORS))
def test_what_comes_in_is_there_once(
    database: Database, forgetful: LostOnce, settings: Settings, door: str
) -> None:
    hand_in, made = DOORS[door]
    hand_in(forgetful, settings)
    assert counts(database) == made


@pytest.mark.parametrize(
    ("door", "quotas"),
    [("job with a key", {"queued_jobs": 1}), ("jobs", {"queued_jobs": 2}), ("file", {"stored_bytes": 2})],
)
def test_what_takes_the_last_room_is_not_in_its_own_way(
    database: Database, forgetful: LostOnce, settings: Settings, door: str, quotas: dict[str, int]
) -> None:
    Tenants(database).change(DEFAULT, quotas=quotas)
    hand_in, made = DOORS[door]
    hand_in(forgetful, settings)
    assert counts(database) == made


def test_a_job_is_there_once_and_shown_as_it_is_read(
    database: Database, forgetful: LostOnce, settings: Settings
) -> None:
    shown = Intake(forgetful, settings).accept_new(JobBody(prompt="a"), OPERATOR)
    assert rows.jobs_by_state(database) == {"queued": [shown.id]}
    assert shown == Reads(database).job(shown.id, tenant=OPERATOR.tenant)


@pytest.mark.parametrize("noun", ["job", "batch"])
def test_a_retry_is_there_once(
    database: Database, forgetful: LostOnce, settings: Settings, noun: str
) -> None:
    batch_id = Intake(database, settings).accept_many([BODY], OPERATOR)
    (job_id,) = rows.jobs_by_state(database)["queued"]
    database.transact(lambda c: c.execute(update(Job).values(state=JobState.FAILED, finished_at=now())))
    retries = Retries(forgetful, settings)
    made = retries.retry_job(job_id, OPERATOR) if noun == "job" else retries.retry_batch(batch_id, OPERATOR)
    assert made is not None
    assert made[1] == {"tiny"}
    assert len(rows.jobs_by_state(database)["queued"]) == 1


def test_a_worker_is_there_once(database: Database, forgetful: LostOnce) -> None:
    forgetful.transact(lambda c: register(c, worker_id="w", model="tiny", lease_seconds=60))
    with database.read() as connection:
        assert connection.scalars(select(Worker.id)).all() == ["w"]


def test_a_tenant_is_there_once_and_is_no_other_ones(database: Database, forgetful: LostOnce) -> None:
    made = Tenants(forgetful).create("blog", weight=2.0)
    assert made in Tenants(database).all()
    with pytest.raises(BadField, match="exists already"):
        Tenants(database).create("blog", weight=2.0)


@pytest.mark.parametrize("valid_from", [None, 1.0])
def test_a_price_is_there_once(database: Database, forgetful: LostOnce, valid_from: float | None) -> None:
    made = Prices(forgetful).set("tiny", prompt="1", completion="2", currency="EUR", valid_from=valid_from)
    assert Prices(database).all() == [made]


def test_a_file_that_was_deleted_had_been_there(
    database: Database, forgetful: LostOnce, settings: Settings
) -> None:
    file_id = Bench(database, settings).upload(b"{}")
    assert Files(forgetful, settings).delete(file_id, tenant=DEFAULT)
    assert not list(settings.files.iterdir())
    assert not Files(database, settings).delete(file_id, tenant=DEFAULT)
    with database.read() as connection:
        check_tallies(connection)
