"""Schedules fire once per time, whoever sees it first, and leave a record of every time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import func, select, update

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.dialects import now
from jobs.intake import Intake
from jobs.leases import register
from jobs.models import Batch, Job, Schedule, Worker
from jobs.quotas import QuotaExceeded
from jobs.schedule_body import parse_schedule
from jobs.schedule_runs import LATE_SECONDS, RunKind, RunView, ScheduleRuns
from jobs.schedules import Schedules, ScheduleView
from jobs.settings import Settings
from jobs.tenants import DEFAULT, OPERATOR, Owner, Tenants
from jobs.timekeeper import Timekeeper
from tests.support.invariants import check_runs, check_tallies

BODY: dict[str, Any] = {
    "name": "nightly",
    "cron": "30 1 * * *",
    "time_zone": "Europe/Berlin",
    "jobs": [{"prompt": "a" * 40, "max_tokens": 90}, {"prompt": "b", "custom_id": "second"}],
    "metadata": {"k": "v"},
}
Make = Callable[..., ScheduleView]


@pytest.fixture
def schedules(database: Database, settings: Settings) -> Schedules:
    return Schedules(database, settings)


@pytest.fixture
def make(schedules: Schedules, settings: Settings) -> Make:
    def make(owner: Owner = OPERATOR, **fields: Any) -> ScheduleView:
        return schedules.create(parse_schedule(BODY | fields, settings), owner)

    return make


@pytest.fixture
def told() -> list[str]:
    """Models that were announced."""
    return []


@pytest.fixture
def keeper(database: Database, settings: Settings, told: list[str]) -> Timekeeper:
    return Timekeeper(database, Intake(database, settings), 60.0, told.append)


def pass_by(database: Database, schedule_id: str, seconds: float) -> float:
    """Its time has come, so long ago; that time."""
    with database.write() as connection:
        connection.execute(update(Schedule).where(Schedule.id == schedule_id).values(next_at=now() - seconds))
        return connection.scalars(select(Schedule.next_at).where(Schedule.id == schedule_id)).one()


def clock(database: Database) -> float:
    with database.read() as connection:
        return connection.scalars(select(now())).one()


def runs_of(database: Database, settings: Settings, schedule_id: str, tenant: str = DEFAULT) -> list[RunView]:
    with database.read() as connection:
        check_runs(connection)
        check_tallies(connection)
    return ScheduleRuns(database, Intake(database, settings)).page(schedule_id, tenant=tenant)[0]


def num_batches(database: Database) -> int:
    with database.read() as connection:
        return connection.scalars(select(func.count()).select_from(Batch)).one()


def test_the_next_time_is_stored(make: Make, database: Database) -> None:
    made = make()
    assert made.next_at is not None
    shown = datetime.fromtimestamp(made.next_at, UTC)
    assert (shown.minute, shown.hour) in ((30, 0), (30, 23))
    assert 0 < made.next_at - clock(database) <= 86_400
    assert make(name="paused", enabled=False).next_at is None


def test_nothing_is_due_before_its_time(make: Make, keeper: Timekeeper, database: Database) -> None:
    make()
    assert keeper.runs.due() == []
    assert keeper.look() == 0
    assert num_batches(database) == 0


def test_a_time_that_has_come_fires(
    make: Make, keeper: Timekeeper, database: Database, settings: Settings, told: list[str]
) -> None:
    Tenants(database).create("blog")
    made = make(Owner("blog", "key_1"))
    fire_time = pass_by(database, made.id, 2)
    assert keeper.look() == 1
    assert keeper.look() == 0
    (run,) = runs_of(database, settings, made.id, "blog")
    assert (run.kind, run.fire_time, run.error) == (RunKind.SCHEDULED, fire_time, None)
    with database.read() as connection:
        (batch,) = connection.execute(select(*Batch.__table__.columns))
        jobs = connection.execute(select(Job.__table__).order_by(Job.position)).all()
        after = connection.execute(select(Schedule.next_at, Schedule.revision)).one()
    assert (batch.id, batch.schedule_id, batch.tenant, batch.key_id) == (
        run.batch_id,
        made.id,
        "blog",
        "key_1",
    )
    assert (batch.total, batch.metadata) == (2, {"k": "v"})
    assert [(job.model, job.tenant, job.custom_id) for job in jobs] == [
        ("tiny", "blog", None),
        ("tiny", "blog", "second"),
    ]
    assert jobs[0].body == {"prompt": "a" * 40, "max_tokens": 90, "model": "tiny"}
    assert after.next_at == made.next_at, "the next one by the line, not a day after the last"
    assert told == ["tiny"]
    assert runs_of(database, settings, made.id) == [], "another tenant's"


def test_a_completion_window_becomes_a_deadline(make: Make, keeper: Timekeeper, database: Database) -> None:
    made = make(completion_window="6h")
    background = make(name="background", completion_window="background")
    for one in (made, background):
        pass_by(database, one.id, 100)
    assert keeper.look() == 2
    with database.read() as connection:
        rows = connection.execute(
            select(Batch.schedule_id, Job.deadline, Job.tier).join(Job, Job.batch_id == Batch.id)
        ).all()
    (deadline,) = {row.deadline for row in rows if row.schedule_id == made.id}
    left = deadline - clock(database)
    assert 6 * 3600 - 60 < left <= 6 * 3600, "from when it fires, not from when it should have"
    assert {(row.deadline, row.tier) for row in rows if row.schedule_id == background.id} == {(None, 3)}


def test_missed_times(make: Make, keeper: Timekeeper, database: Database, settings: Settings) -> None:
    expected: dict[str, tuple[float, RunKind | None]] = {}
    for policy, late, kind in (
        ("skip", LATE_SECONDS - 60, RunKind.SCHEDULED),
        ("skip", LATE_SECONDS + 60, None),
        ("skip", 10 * 86_400, None),
        ("run_once", LATE_SECONDS - 60, RunKind.SCHEDULED),
        ("run_once", LATE_SECONDS + 60, RunKind.CATCH_UP),
        ("run_once", 10 * 86_400, RunKind.CATCH_UP),
    ):
        made = make(name=f"{policy} {late}", missed=policy, cron="* * * * *")
        expected[made.id] = pass_by(database, made.id, late), kind
    assert [keeper.look() for _ in range(3)] == [4, 0, 0]
    for schedule_id, (fire_time, kind) in expected.items():
        runs = runs_of(database, settings, schedule_id)
        assert [(run.kind, run.fire_time) for run in runs] == ([] if kind is None else [(kind, fire_time)])
    with database.read() as connection:
        assert min(connection.scalars(select(Schedule.next_at))) > clock(database) - 1, (
            "only the future is left"
        )


def test_many_processes_fire_one_time_once(
    make: Make, database: Database, settings: Settings, told: list[str]
) -> None:
    made = [make(name=f"number {i}") for i in range(3)]
    for round_ in range(3):
        for one in made:
            pass_by(database, one.id, 1 + round_)
        others = [Database(database.url) for _ in range(5)]
        barrier = threading.Barrier(len(others))

        def look(other: Database, barrier: threading.Barrier = barrier) -> int:
            keeper = Timekeeper(other, Intake(other, settings), 60.0, told.append)
            barrier.wait()
            return keeper.look()

        with ThreadPoolExecutor(len(others)) as pool:
            assert sum(pool.map(look, others)) == 3
        for other in others:
            other.close()
        assert num_batches(database) == 3 * (round_ + 1)
    assert {len(runs_of(database, settings, one.id)) for one in made} == {3}
    assert len(told) == 9


def test_a_time_that_has_fired_does_not_fire_again(
    make: Make, keeper: Timekeeper, database: Database, settings: Settings
) -> None:
    """Even if the next time is set back, as by a clock that was."""
    made = make()
    fire_time = pass_by(database, made.id, 5)
    assert keeper.look() == 1
    with database.write() as connection:
        connection.execute(update(Schedule).values(next_at=fire_time))
    assert keeper.look() == 0
    assert len(runs_of(database, settings, made.id)) == num_batches(database) == 1
    with database.read() as connection:
        assert connection.scalars(select(Schedule.next_at > now())).one()


def test_a_commit_that_got_lost_is_not_run_twice(
    make: Make, keeper: Timekeeper, database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    once = database.transact

    def twice(work: Any, **options: Any) -> Any:
        once(work, **options)
        return once(work, **options)

    monkeypatch.setattr(database, "transact", twice)
    pass_by(database, made.id, 5)
    assert keeper.look() == 1
    started = keeper.runs.start(made.id, OPERATOR)
    assert started is not None
    monkeypatch.undo()
    manual, scheduled = runs_of(database, settings, made.id)
    assert (manual.id, manual.kind, scheduled.kind) == (started.run.id, RunKind.MANUAL, RunKind.SCHEDULED)
    assert num_batches(database) == 2


def test_a_refused_run_is_recorded_with_its_reason(
    make: Make, keeper: Timekeeper, database: Database, settings: Settings, told: list[str]
) -> None:
    made = make()
    Tenants(database).change(DEFAULT, quotas={"queued_jobs": 1})
    pass_by(database, made.id, 5)
    assert keeper.look() == 1
    assert keeper.look() == 0, "it is not tried again"
    (run,) = runs_of(database, settings, made.id)
    assert run.batch_id is None
    assert run.error is not None
    assert run.error["code"] == "quota_exceeded"
    assert "queued_jobs" in run.error["message"]
    assert (num_batches(database), told) == (0, [])
    with pytest.raises(QuotaExceeded):
        keeper.runs.start(made.id, OPERATOR)
    assert len(runs_of(database, settings, made.id)) == 1


def test_a_window_that_cannot_be_met_refuses_the_run(
    make: Make, keeper: Timekeeper, database: Database, settings: Settings
) -> None:
    pace = {
        "tokens_per_second": 1.0,
        "steps_per_second": 1.0,
        "computed_tokens": 1.0,
        "estimated_tokens": 1.0,
    }
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=600)
        connection.execute(update(Worker).values(pace=pace))
    made = make(completion_window="60s")
    pass_by(database, made.id, 5)
    keeper.look()
    (run,) = runs_of(database, settings, made.id)
    assert run.error is not None
    assert run.error["code"] == "window_cannot_be_met"


def test_a_model_that_nobody_serves_any_more(make: Make, database: Database, settings: Settings) -> None:
    made = make()
    elsewhere = settings.model_copy(update={"model": ""})
    pass_by(database, made.id, 5)
    assert Timekeeper(database, Intake(database, elsewhere), 60.0, lambda model: None).look() == 1
    (run,) = runs_of(database, settings, made.id)
    assert run.error is not None
    assert run.error["param"] == "jobs[0].model"


def test_one_that_cannot_be_fired_holds_up_no_other(
    make: Make, keeper: Timekeeper, database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = make(name="broken"), make(name="sound")
    with database.write() as connection:
        connection.execute(update(Schedule).where(Schedule.id == broken.id).values(time_zone="Mars/Olympus"))
    pass_by(database, broken.id, 9)
    pass_by(database, sound.id, 5)
    assert keeper.look() == 1
    assert len(runs_of(database, settings, sound.id)) == 1
    assert f"schedule={broken.id}" in caplog.text


def test_pause_and_resume(make: Make, schedules: Schedules, keeper: Timekeeper, database: Database) -> None:
    made = make(missed="run_once")

    def enable(enabled: bool) -> ScheduleView | None:
        return schedules.change(made.id, {"enabled": enabled}, tenant=DEFAULT)

    pass_by(database, made.id, 3600)
    paused = enable(False)
    assert paused is not None
    assert paused.next_at is None
    assert keeper.look() == 0
    resumed = enable(True)
    assert resumed is not None
    assert resumed.next_at == made.next_at, "what passed during a pause was not missed"
    assert keeper.look() == 0


def test_a_change_between_look_and_fire_wins(
    make: Make, schedules: Schedules, keeper: Timekeeper, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    pass_by(database, made.id, 5)
    once = database.transact

    def changed_first(work: Any, **options: Any) -> Any:
        monkeypatch.setattr(database, "transact", once)
        with database.write() as connection:  # what a PATCH of the jobs in another process does to the row
            connection.execute(update(Schedule).values(jobs=[], revision=Schedule.revision + 1))
        return once(work, **options)

    monkeypatch.setattr(database, "transact", changed_first)
    assert keeper.look() == 0
    assert num_batches(database) == 0


def test_a_deleted_schedule_keeps_its_runs(
    make: Make, schedules: Schedules, keeper: Timekeeper, database: Database, settings: Settings
) -> None:
    made = make()
    pass_by(database, made.id, 5)
    keeper.look()
    pass_by(database, made.id, 4)
    deleted = schedules.delete(made.id, tenant=DEFAULT)
    assert deleted is not None
    assert deleted.deleted_at is not None
    again = schedules.delete(made.id, tenant=DEFAULT)
    assert again == deleted
    assert keeper.look() == 0
    assert keeper.runs.start(made.id, OPERATOR) is None
    assert schedules.change(made.id, {"enabled": True}, tenant=DEFAULT) is None
    assert schedules.page(tenant=DEFAULT) == ([], False)
    assert len(runs_of(database, settings, made.id)) == num_batches(database) == 1
    assert make().name == made.name, "its name is free again"
    assert schedules.delete(made.id, tenant="other") is None


def test_pages(make: Make, schedules: Schedules, keeper: Timekeeper, database: Database) -> None:
    made = [make(name=f"n{i}") for i in range(5)]
    newest_first = [one.id for one in reversed(made)]
    first, more = schedules.page(tenant=DEFAULT, limit=3)
    assert ([one.id for one in first], more) == (newest_first[:3], True)
    rest, more = schedules.page(tenant=DEFAULT, limit=3, after=first[-1].id)
    assert ([one.id for one in rest], more) == (newest_first[3:], False)
    assert [one.id for one in schedules.page(tenant=DEFAULT, name="n2")[0]] == [made[2].id]
    times: list[float] = []
    for seconds in (50, 40, 30):
        times.append(pass_by(database, made[0].id, seconds))
        assert keeper.look() == 1
    runs, more = keeper.runs.page(made[0].id, tenant=DEFAULT, limit=2)
    assert ([run.fire_time for run in runs], more) == (times[:0:-1], True)
    runs, more = keeper.runs.page(made[0].id, tenant=DEFAULT, limit=2, after=runs[-1].id)
    assert ([run.fire_time for run in runs], more) == (times[:1], False)
    with pytest.raises(BadField):
        keeper.runs.page(made[1].id, tenant=DEFAULT, after=runs[0].id)
    with pytest.raises(BadField):
        schedules.page(tenant=DEFAULT, after="schedule_x")


def test_more_due_schedules_than_one_look_takes(
    make: Make, keeper: Timekeeper, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    monkeypatch.setattr("jobs.schedule_runs.PAGE", 2)
    monkeypatch.setattr("jobs.timekeeper.PAGE", 2)
    for i in range(5):
        pass_by(database, make(name=f"n{i}").id, 5)
    assert keeper.look() == 5
