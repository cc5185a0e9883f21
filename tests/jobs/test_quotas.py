"""Quotas hold under concurrent submits, and their sums are the rows' at every turn of a job's life."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, text, update

from jobs import tallies
from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.database import Database
from jobs.drafts import BYTES_PER_TOKEN, estimate_tokens
from jobs.intake import Intake, TaskMessage
from jobs.leases import register
from jobs.models import LedgerEntry, Tally, Worker
from jobs.outcomes import Outcome, record
from jobs.quotas import QuotaExceeded, open_room
from jobs.settings import Settings
from jobs.sweeper import Sweeper
from jobs.tenants import DEFAULT, OPERATOR, Owner, Tenants
from tests.support import rows
from tests.support.invariants import check_tallies

BODY = JobBody(prompt="a" * 40, max_tokens=90)  # 100 tokens, as they are estimated
OTHER = Owner("other", "key_of_other")
OUTPUTS = [{"index": 0, "text": "out ☾", "finish_reason": "stop", "stop_reason": None}]


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)
    Tenants(database).create("other")
    return Intake(database, settings)


def limit(database: Database, tenant: str = DEFAULT, **quotas: int | None) -> None:
    Tenants(database).change(tenant, quotas=quotas)


def use_of(database: Database, tenant: str = DEFAULT) -> tallies.Use:
    with database.read() as connection:
        check_tallies(connection)
        return tallies.used(connection, tenant)


def take(database: Database, count: int) -> list[Any]:
    with database.write() as connection:
        return claim(connection, worker_id="w", model="tiny", limit=count)


def end(database: Database, claims: list[Any], kind: str) -> None:
    outcomes = [
        Outcome(
            job_id=one.job_id,
            fence=one.fence,
            kind=kind,  # type: ignore[arg-type]
            outputs=OUTPUTS if kind == "completed" else [],
            prompt_tokens=7,
            completion_tokens=5,
        )
        for one in claims
    ]
    for _ in range(2):  # a commit that got lost is run again
        database.transact(lambda connection: record(connection, worker_id="w", outcomes=outcomes))


def test_the_sums_follow_a_job_through_its_life(database: Database, intake: Intake) -> None:
    assert use_of(database).queued_jobs == 0
    batch_id = intake.accept_many([BODY] * 6, OPERATOR)
    intake.accept_one(BODY, OTHER)
    one = intake.accept_one(BODY, OPERATOR)
    use = use_of(database)
    assert (use.queued_jobs, use.queued_tokens, use.tokens_per_day) == (7, 700, 0)
    assert use.stored_bytes > 7 * 40
    claims = take(database, 5)
    assert use_of(database).queued_jobs == 7, "a running job has not ended"
    end(database, claims[:1], "released")
    assert use_of(database).queued_jobs == 7
    stored = use.stored_bytes
    end(database, claims[1:2], "completed")
    use = use_of(database)
    assert (use.queued_jobs, use.queued_tokens, use.tokens_per_day) == (6, 600, 12)
    assert use.stored_bytes == stored + tallies.size_of(OUTPUTS)
    end(database, claims[2:3], "failed")
    assert use_of(database).queued_jobs == 5
    cancels = Cancels(database)
    cancels.cancel_batch(batch_id, tenant=DEFAULT)
    cancels.cancel_batch(batch_id, tenant=DEFAULT)
    assert use_of(database).queued_jobs == 3, "two are with the worker, and one was alone"
    cancels.cancel_job(one, tenant=DEFAULT)
    cancels.cancel_job(one, tenant=DEFAULT)
    assert use_of(database).queued_jobs == 2
    with database.write() as connection:  # the worker dies: what was being cancelled ends
        connection.execute(update(Worker).values(lease_until=0.0))
    Sweeper(database, 60.0, lambda model: None).sweep()
    use = use_of(database)
    assert (use.queued_jobs, use.queued_tokens, use.tokens_per_day) == (0, 0, 12)
    assert use_of(database, "other").queued_jobs == 1


def test_who_asked_is_on_every_row(database: Database, intake: Intake) -> None:
    intake.accept_many([BODY], OTHER)
    end(database, take(database, 1), "completed")
    with database.read() as connection:
        found = {
            table: connection.execute(text(f"SELECT tenant, key_id FROM {table}")).all()
            for table in ("batches", "jobs", "ledger")
        }
    assert {table: [tuple(row) for row in lines] for table, lines in found.items()} == {
        table: [("other", "key_of_other")] for table in found
    }
    intake.accept_one(BODY, OTHER)
    take(database, 1)
    with database.write() as connection:
        connection.execute(update(Worker).values(lease_until=0.0))
    Sweeper(database, 60.0, lambda model: None).sweep()
    with database.read() as connection:
        wasted = connection.execute(
            select(LedgerEntry.tenant, LedgerEntry.key_id).where(LedgerEntry.kind == "wasted")
        ).one()
    assert tuple(wasted) == ("other", "key_of_other")


def test_an_estimate(settings: Settings) -> None:
    assert BYTES_PER_TOKEN == 4
    assert estimate_tokens(BODY, settings) == 100
    assert estimate_tokens(JobBody(prompt="☾" * 4, max_tokens=5, n=3), settings) == 3 + 15
    chat = [{"role": "user", "content": "12345"}, {"role": "assistant", "content": "678"}]
    assert estimate_tokens(JobBody(messages=chat, max_completion_tokens=7), settings) == 9  # type: ignore[arg-type]
    assert estimate_tokens(JobBody(prompt="a"), settings) == 1 + settings.default_max_tokens
    assert estimate_tokens(JobBody(prompt="a", min_tokens=5000), settings) == 1 + 5000


@pytest.mark.parametrize(
    ("quotas", "bodies", "quota", "helps"),
    [
        ({"queued_jobs": 3}, 2, "queued_jobs", True),
        ({"queued_jobs": 3}, 4, "queued_jobs", False),
        ({"queued_jobs": 0}, 1, "queued_jobs", False),
        ({"queued_tokens": 399}, 2, "queued_tokens", True),
        ({"queued_tokens": 199}, 2, "queued_tokens", False),
        ({"stored_bytes": 300}, 2, "stored_bytes", False),
    ],
)
def test_what_does_not_fit_is_refused_whole(
    database: Database, intake: Intake, quotas: dict[str, int], bodies: int, quota: str, helps: bool
) -> None:
    intake.accept_many([BODY] * 2, OPERATOR)
    before = use_of(database)
    limit(database, **quotas)
    with pytest.raises(QuotaExceeded) as caught:
        intake.accept_many([BODY] * bodies, OPERATOR)
    error = caught.value
    assert (error.quota, error.code) == (quota, "quota_exceeded")
    assert f"at most {quotas[quota]} " in error.message
    assert f"{getattr(before, quota)} are used" in error.message
    assert (error.retry_after is not None) is helps
    after = use_of(database)
    assert (after.queued_jobs, after.stored_bytes) == (before.queued_jobs, before.stored_bytes)
    with database.read() as connection:
        assert connection.scalars(text("SELECT count(*) FROM batches")).one() == 1
    intake.accept_many([BODY] * bodies, OTHER)  # each tenant has its own
    limit(database, **dict.fromkeys(quotas))
    intake.accept_many([BODY] * bodies, OPERATOR)


def test_the_last_place_may_be_taken(database: Database, intake: Intake) -> None:
    limit(database, queued_jobs=3, queued_tokens=300)
    intake.accept_many([BODY] * 3, OPERATOR)
    with pytest.raises(QuotaExceeded):
        intake.accept_one(BODY, OPERATOR)
    end(database, take(database, 1), "failed")
    intake.accept_one(BODY, OPERATOR)


def test_a_days_tokens(database: Database, intake: Intake) -> None:
    limit(database, tokens_per_day=13)
    intake.accept_many([BODY] * 2, OPERATOR)
    end(database, take(database, 1), "completed")  # 12 tokens
    intake.accept_one(BODY, OPERATOR)
    end(database, take(database, 1), "completed")
    with pytest.raises(QuotaExceeded) as caught:
        intake.accept_one(BODY, OPERATOR)
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 86_400
    assert "24 are used" in caught.value.message
    with database.write() as connection:  # midnight
        connection.execute(update(Tally).values(day=Tally.day - 1))
    intake.accept_one(BODY, OPERATOR)
    end(database, take(database, 1), "completed")
    with database.read() as connection:
        assert tallies.used(connection, DEFAULT).tokens_per_day == 12


def test_what_comes_late_for_yesterday_is_not_todays(database: Database, intake: Intake) -> None:
    with database.write() as connection:
        tallies.add(connection, [tallies.Change("other", billed=5)])
        connection.execute(update(Tally).where(Tally.tenant == "other").values(day=Tally.day + 1))
    for _ in range(40):  # whichever row of several each of them finds
        with database.write() as connection:
            tallies.add(connection, [tallies.Change("other", billed=1)])
    with database.read() as connection:
        days = select(Tally.day_tokens).where(Tally.tenant == "other").order_by(Tally.day.desc())
        tomorrow = connection.scalars(days).first()
    assert tomorrow == 5


def test_defaults_come_from_the_settings(database: Database, settings: Settings, intake: Intake) -> None:
    strict = Intake(database, settings.model_copy(update={"quota_queued_jobs": 1}))
    strict.accept_one(BODY, OPERATOR)
    with pytest.raises(QuotaExceeded):
        strict.accept_one(BODY, OPERATOR)
    limit(database, queued_jobs=None)
    strict.accept_one(BODY, OPERATOR)
    Tenants(database).change(DEFAULT, unset=frozenset({"queued_jobs"}))
    with pytest.raises(QuotaExceeded):
        strict.accept_one(BODY, OPERATOR)


def test_submits_at_the_same_time_cannot_both_slip_through(
    database: Database, settings: Settings, intake: Intake
) -> None:
    limit(database, queued_jobs=20)
    start = threading.Barrier(8)

    def submit(worker: int) -> list[int]:
        mine = Intake(database, settings)
        start.wait()
        accepted = []
        for size in (1, 3, 1, 2):
            try:
                mine.accept_many([BODY] * size, OPERATOR)
                accepted.append(size)
            except QuotaExceeded:
                pass
        return accepted

    with ThreadPoolExecutor(8) as pool:
        sizes = [size for taken in pool.map(submit, range(8)) for size in taken]
    assert sum(sizes) == use_of(database).queued_jobs <= 20
    assert sum(sizes) == 20, "the last places were single ones, and somebody got them"


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # SQLite has one writer for all
def test_tenants_do_not_wait_for_each_other(database: Database, settings: Settings, intake: Intake) -> None:
    limit(database, queued_jobs=5)
    limit(database, "other", queued_jobs=5)
    with database.write() as connection:
        open_room(connection, DEFAULT, settings)
        intake.accept_one(BODY, OTHER)  # from a second connection; it would run into the lock's timeout


def test_messages_fill_what_room_there_is(database: Database, intake: Intake) -> None:
    limit(database, queued_jobs=2)
    group = [TaskMessage(f"m{i}", BODY, DEFAULT) for i in range(4)]
    group += [
        TaskMessage("o1", BODY, "other"),
        TaskMessage("lost", BODY, "nobody"),
        TaskMessage("m0", BODY, DEFAULT),
    ]
    refused = intake.accept_messages(group)
    assert set(refused) == {"m2", "m3", "lost"}
    assert isinstance(refused["m2"], QuotaExceeded)
    assert isinstance(refused["lost"], BadField)
    assert rows.jobs_by_state(database) == {"queued": ["m0", "m1", "o1"]}
    assert intake.accept_messages(group[:2]) == {}, "a duplicate asks for no room"
    assert use_of(database).queued_jobs == 2
    error = refused["m2"].as_error()
    for _ in range(2):
        intake.accept_invalid("m2", error, DEFAULT)
    assert rows.job(database, "m2").error["code"] == "quota_exceeded"
    assert use_of(database).queued_jobs == 2


def test_a_lost_commit_that_is_run_again_counts_once(
    database: Database, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction is run twice, as when its connection broke just after the commit."""
    limit(database, queued_jobs=2)
    once = database.transact

    def twice(work: Any, **options: Any) -> Any:
        once(work, **options)
        return once(work, **options)

    monkeypatch.setattr(database, "transact", twice)
    intake.accept_many([BODY] * 2, OPERATOR)
    intake.accept_one(BODY, OTHER)
    intake.accept_messages([TaskMessage("m", BODY, "other")])
    Cancels(database).revoke("m", running=True)
    monkeypatch.undo()
    assert use_of(database).queued_jobs == 2
    assert use_of(database, "other").queued_jobs == 1
