"""Retries: only what did not work out, as new jobs that say the same, within the quotas, once per key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, update

from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.database import Database
from jobs.idempotency import KeyReusedError, Submit
from jobs.intake import Intake
from jobs.leases import register
from jobs.models import Batch, Job
from jobs.outcomes import Outcome, record
from jobs.quotas import QuotaExceeded
from jobs.retries import NothingToRetry, Retries, parse_states
from jobs.settings import Settings
from jobs.states import JobState
from jobs.tenants import OPERATOR, Owner, Tenants
from tests.support import rows
from tests.support.batch_lines import Bench, run
from tests.support.invariants import check_tallies

KEY = Owner("default", "key_a")
FAILED, CANCELLED = JobState.FAILED, JobState.CANCELLED


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)
    return Intake(database, settings)


@pytest.fixture
def retries(database: Database, settings: Settings) -> Retries:
    return Retries(database, settings)


def night(database: Database, intake: Intake, count: int = 6) -> str:
    """A batch whose jobs 0, 3, … failed, 1, 4, … were cancelled, 2, 5, … completed."""
    bodies = [
        JobBody(
            prompt=f"☾ {i}", custom_id=f"c{i}", metadata={"i": str(i)}, seed=i if i % 2 else None, n=1 + i
        )
        for i in range(count)
    ]
    batch_id = intake.accept_many(bodies, OPERATOR, {"night": "7"})
    for row in members(database, batch_id):
        if row.position % 3 == 1:
            Cancels(database).cancel_job(row.id, tenant="default")
    with database.write() as connection:
        positions = {row.id: row.position for row in members(database, batch_id)}
        outcomes = [
            Outcome(
                job_id=one.job_id,
                fence=1,
                kind="completed" if positions[one.job_id] % 3 else "failed",
                outputs=[{"index": 0, "text": "a", "finish_reason": "stop", "stop_reason": None}],
                error={"code": "numerics", "message": "NaN"},
                prompt_tokens=1,
            )
            for one in claim(connection, worker_id="w", model="tiny", limit=count)
        ]
        record(connection, worker_id="w", outcomes=outcomes)
    return batch_id


def members(database: Database, batch_id: str) -> list[Any]:
    query = select(*Job.__table__.columns).where(Job.batch_id == batch_id).order_by(Job.position)
    with database.read() as connection:
        return list(connection.execute(query))


def batch_of(database: Database, batch_id: str) -> Any:
    with database.read() as connection:
        return connection.execute(select(*Batch.__table__.columns).where(Batch.id == batch_id)).one()


def tallies_hold(database: Database) -> bool:
    with database.read() as connection:
        check_tallies(connection)
    return True


@pytest.mark.parametrize(("states", "positions"), [({FAILED}, [0, 3]), ({CANCELLED, FAILED}, [0, 1, 3, 4])])
def test_a_batch(
    database: Database, intake: Intake, retries: Retries, states: set[JobState], positions: list[int]
) -> None:
    old_id = night(database, intake)
    made = retries.retry_batch(old_id, KEY, states=frozenset(states))
    assert made is not None
    new_id, models = made
    assert models == {"tiny"}
    old, new = members(database, old_id), members(database, new_id)
    assert [row.position for row in new] == list(range(len(positions)))
    for row, position in zip(new, positions, strict=True):
        before = old[position]
        same = ("body", "seed", "model", "custom_id", "metadata", "prefix_group", "estimated_tokens")
        for column in (*same, "num_samples"):
            assert getattr(row, column) == getattr(before, column), column
        assert row.num_samples == 1 + position
        assert (row.retry_of, row.key_id, row.state, row.fence) == (before.id, "key_a", "queued", 0)
        assert (row.error, row.worker_id, row.finished_at, row.source) == (None, None, None, "http")
    batch = batch_of(database, new_id)
    assert (batch.retry_of, batch.total, batch.state) == (old_id, len(positions), "in_progress")
    assert (batch.metadata, batch.endpoint, batch.key_id) == ({"night": "7"}, "/v1/jobs", "key_a")
    assert batch_of(database, old_id).state == "completed"
    assert tallies_hold(database)
    with database.write() as connection:  # and they run
        assert len(claim(connection, worker_id="w", model="tiny", limit=100)) == len(positions)


def test_a_window_begins_anew(database: Database, intake: Intake, retries: Retries) -> None:
    old_id = night(database, intake)
    failed = members(database, old_id)[0]
    with database.write() as connection:
        connection.execute(
            update(Job)
            .where(Job.id == failed.id)
            .values(
                deadline=failed.created_at + 3600,
                created_at=failed.created_at,
                tier=1,
                priority=3,
                not_before=5.0,
            )
        )
    made = retries.retry_job(failed.id, KEY)
    assert made is not None
    row = rows.job(database, made[0])
    assert row.deadline == pytest.approx(row.created_at + 3600, abs=5)
    assert (row.tier, row.priority, row.not_before) == (2, 3, None)
    assert (row.batch_id, row.retry_of, row.seed) == (None, failed.id, failed.seed)
    assert tallies_hold(database)


def test_lines_that_waited_for_a_clerk_get_their_whole_window_again(
    database: Database, settings: Settings, retries: Retries
) -> None:
    bench = Bench(database, settings)
    old_id = bench.create(2, window="2h")
    handed_in = bench.batch(old_id)
    hour = {name: getattr(handed_in, name) - 3600 for name in ("created_at", "expires_at")}
    bench.change(old_id, **hour)
    bench.work()
    run(database, failing=["line-0", "line-1"])
    bench.work()
    batch = retries.retry_batch(old_id, KEY)
    assert batch is not None
    again = bench.batch(batch[0])
    assert again.expires_at == pytest.approx(again.created_at + 7200, abs=5)
    assert [job.deadline for job in bench.jobs(again.id)] == pytest.approx([again.expires_at] * 2, abs=5)
    job = retries.retry_job(bench.jobs(old_id)[0].id, KEY)
    assert job is not None
    row = rows.job(database, job[0])
    assert row.deadline == pytest.approx(row.created_at + 7200, abs=5)


def test_many_portions_keep_their_order(database: Database, intake: Intake, retries: Retries) -> None:
    old_id = intake.accept_many([JobBody(prompt=f"{i}") for i in range(1203)], OPERATOR)
    Cancels(database).cancel_batch(old_id, tenant="default")
    made = retries.retry_batch(old_id, KEY, states=frozenset({CANCELLED}))
    assert made is not None
    new = members(database, made[0])
    assert [row.body["prompt"] for row in new] == [str(i) for i in range(1203)]
    assert [row.position for row in new] == list(range(1203))
    assert batch_of(database, made[0]).total == 1203
    assert tallies_hold(database)


def test_nothing_to_retry(database: Database, intake: Intake, retries: Retries) -> None:
    old_id = night(database, intake, 3)
    failed, cancelled, completed = members(database, old_id)
    with pytest.raises(NothingToRetry, match="expired"):
        retries.retry_batch(old_id, KEY, states=frozenset({JobState.EXPIRED}))
    for row in (cancelled, completed):
        with pytest.raises(NothingToRetry, match=row.state):
            retries.retry_job(row.id, KEY)
    intake.accept_invalid("refused", {"code": "x", "message": "y", "param": None}, "default")
    with pytest.raises(NothingToRetry, match="refused"):
        retries.retry_job("refused", KEY)
    stranger = Owner("other", None)
    assert retries.retry_job(failed.id, stranger) is None
    assert retries.retry_batch(old_id, stranger) is None
    assert retries.retry_batch("batch_x", KEY) is None
    assert len(rows.jobs_by_state(database).get("queued", [])) == 0


def test_the_same_key_retries_once(database: Database, intake: Intake, retries: Retries) -> None:
    old_id = night(database, intake)
    failed = members(database, old_id)[0]
    submit = Submit.of("again", {"retry_of": old_id})
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: retries.retry_batch(old_id, KEY, submit=submit), range(4)))
    assert len({one[0] for one in made if one}) == 1
    assert sum(len(one[1]) for one in made if one) == 1, "workers are told once"
    with pytest.raises(KeyReusedError):
        retries.retry_job(failed.id, KEY, submit=Submit.of("again", {"retry_of": failed.id}))
    one = [retries.retry_job(failed.id, KEY, submit=Submit.of("one", {})) for _ in range(2)]
    assert one[0] is not None
    assert one[1] == (one[0][0], frozenset())
    assert len(rows.jobs_by_state(database)["queued"]) == 3
    assert tallies_hold(database)


def test_quotas_hold(database: Database, intake: Intake, retries: Retries) -> None:
    old_id = night(database, intake)
    Tenants(database).change("default", quotas={"queued_jobs": 1})
    submit = Submit.of("key", {})
    with pytest.raises(QuotaExceeded, match="asks for 2"):
        retries.retry_batch(old_id, KEY, submit=submit)
    failed = members(database, old_id)[0]
    assert retries.retry_job(failed.id, KEY, submit=submit), "a refused submit uses up no key"
    with pytest.raises(QuotaExceeded):
        retries.retry_job(failed.id, KEY)
    assert tallies_hold(database)


def test_what_states_may_be() -> None:
    assert parse_states(["failed", "cancelled"]) == {FAILED, CANCELLED}
    for bad in ([], "failed", ["completed"], ["queued"], [1], [["failed"]], None, {"failed": 1}):
        with pytest.raises(BadField, match="states"):
            parse_states(bad)


def test_a_running_batch(database: Database, intake: Intake, retries: Retries) -> None:
    """What fails later is in the next retry."""
    old_id = intake.accept_many([JobBody(prompt="a"), JobBody(prompt="b")], OPERATOR)
    first, second = (row.id for row in members(database, old_id))
    with database.write() as connection:
        claim(connection, worker_id="w", model="tiny", limit=2)
    for job_id in (first, second):
        outcome = Outcome(job_id=job_id, fence=1, kind="failed", error={"code": "x", "message": "y"})
        database.transact(lambda c, o=outcome: record(c, worker_id="w", outcomes=[o]))
        made = retries.retry_batch(old_id, KEY)
        assert made is not None
        expected = [first] if job_id == first else [first, second]
        assert [row.retry_of for row in members(database, made[0])] == expected
