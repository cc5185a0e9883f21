"""Schedules as they are made and changed: names, times, and the room that their jobs take."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.intake import Intake
from jobs.quotas import QuotaExceeded
from jobs.schedule_body import parse_change, parse_schedule
from jobs.schedule_runs import ScheduleRuns
from jobs.schedules import Schedules, ScheduleView
from jobs.settings import Settings
from jobs.tenants import DEFAULT, OPERATOR, Owner, Tenants
from tests.jobs.test_schedules import BODY, Make, pass_by, runs_of
from tests.support.invariants import check_tallies


@pytest.fixture
def schedules(database: Database, settings: Settings) -> Schedules:
    return Schedules(database, settings)


@pytest.fixture
def make(schedules: Schedules, settings: Settings) -> Make:
    return lambda owner=OPERATOR, **fields: schedules.create(parse_schedule(BODY | fields, settings), owner)


def test_changes(make: Make, schedules: Schedules, settings: Settings, database: Database) -> None:
    made = make(completion_window="6h")

    def change(data: dict[str, Any]) -> ScheduleView:
        changed = schedules.change(made.id, parse_change(data, settings), tenant=DEFAULT)
        assert changed is not None
        return changed

    changed = change({"time_zone": "UTC"})
    assert changed.next_at is not None
    assert datetime.fromtimestamp(changed.next_at, UTC).hour == 1
    assert change({"cron": "30 3 * * *"}).next_at == pytest.approx(changed.next_at + 7200, abs=86_400)
    changed = change({"jobs": [{"prompt": "longer " * 50}], "metadata": None, "completion_window": None})
    assert (changed.num_jobs, changed.metadata, changed.completion_window) == (1, {}, None)
    assert schedules.jobs(made.id, tenant=DEFAULT) == [{"prompt": "longer " * 50}]
    runs_of(database, settings, made.id)  # tallies
    make(name="other")
    with pytest.raises(BadField) as caught:
        change({"name": "other"})
    assert (caught.value.param, caught.value.code) == ("name", "name_taken")
    with pytest.raises(BadField) as caught:
        change({"time_zone": "Mars/Olympus"})
    assert caught.value.param == "time_zone"
    assert schedules.change(made.id, {"name": "x"}, tenant="other") is None


def test_names_are_a_tenants_own(make: Make, database: Database) -> None:
    Tenants(database).create("blog")
    make()
    make(Owner("blog", None))
    with pytest.raises(BadField) as caught:
        make()
    assert caught.value.code == "name_taken"


def test_stored_jobs_count_as_stored_bytes(make: Make, schedules: Schedules, database: Database) -> None:
    Tenants(database).change(DEFAULT, quotas={"stored_bytes": 300, "queued_jobs": 0, "tokens_per_day": 0})
    made = make()
    with pytest.raises(QuotaExceeded, match="stored_bytes"):
        make(name="second", jobs=[{"prompt": "c" * 200}])
    schedules.delete(made.id, tenant=DEFAULT)
    make(name="second", jobs=[{"prompt": "c" * 200}])
    with database.read() as connection:
        check_tallies(connection)


def test_what_is_due_stays_due(
    make: Make, schedules: Schedules, settings: Settings, database: Database
) -> None:
    """Whether a change says what is so already or what is new; but a pause misses nothing."""
    due = pass_by(database, make().id, 1.0)
    (view,) = schedules.page(tenant=DEFAULT)[0]
    for data in ({"enabled": True}, {"cron": view.cron}, {"cron": "0 5 * * *"}, {"time_zone": "Asia/Tokyo"}):
        changed = schedules.change(view.id, parse_change(data, settings), tenant=DEFAULT)
        assert changed is not None
        assert changed.next_at == due, data
    paused = schedules.change(view.id, {"enabled": False}, tenant=DEFAULT)
    assert paused is not None
    assert paused.next_at is None
    resumed = schedules.change(view.id, {"enabled": True}, tenant=DEFAULT)
    assert resumed is not None
    assert resumed.next_at is not None
    assert resumed.next_at > due


def test_runs_by_hand_at_the_same_moment(make: Make, database: Database, settings: Settings) -> None:
    """A clock may not tell them apart: each has a time of its own all the same."""
    schedule = make()
    runs = ScheduleRuns(database, Intake(database, settings))
    with ThreadPoolExecutor(4) as threads:
        started = list(threads.map(lambda _: runs.start(schedule.id, OPERATOR), range(24)))
    assert all(one is not None and one.run.batch_id for one in started)
    assert len({one.run.fire_time for one in started if one is not None}) == 24
