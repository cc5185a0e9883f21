"""Claims: in order of work, never twice, whoever asks at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from jobs.body import JobBody, parse_job
from jobs.claims import claim, models_with_work
from jobs.database import Database
from jobs.intake import Intake
from jobs.leases import leave, register
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.tenants import OPERATOR
from jobs.terms import Terms, Tier
from tests.support import rows


def test_claims_in_order_and_only_once(database: Database, submit) -> None:
    ids = submit(5)
    take = partial(claim, worker_id="w", model="tiny")
    first = database.transact(lambda c: take(c, limit=3))
    second = database.transact(lambda c: take(c, limit=3))
    assert sorted(item.job_id for item in first + second) == ids
    assert [item.fence for item in first + second] == [1] * 5
    assert database.transact(lambda c: take(c, limit=3)) == []
    assert rows.job(database, ids[0]).worker_id == "w"
    assert rows.job(database, ids[0]).started_at is not None


def test_another_models_jobs_are_left_alone(database: Database, submit) -> None:
    submit(2)
    assert database.transact(lambda c: claim(c, worker_id="w", model="other", limit=9)) == []


def test_only_models_that_somebody_serves_have_work_for_anybody(
    database: Database, settings: Settings, submit
) -> None:
    submit(2)
    intake = Intake(database, settings)
    for number in range(3):
        intake.accept_one(parse_job({"prompt": "x", "model": f"junk-{number}"}, settings), OPERATOR)

    def served() -> list[str]:
        with database.read() as connection:
            return models_with_work(connection)

    def start(worker_id: str, model: str) -> None:
        database.transact(partial(register, worker_id=worker_id, model=model, lease_seconds=60.0))

    assert served() == []
    start("w", "tiny")
    start("w2", "tiny")
    start("idle", "idle")
    assert served() == ["tiny"]
    start("late", "junk-1")
    assert sorted(served()) == ["junk-1", "tiny"]
    database.transact(partial(leave, worker_id="late"))
    assert served() == ["tiny"]
    database.transact(partial(claim, worker_id="w", model="tiny", limit=9))
    assert served() == []


def test_concurrent_claims_never_share_a_job(database: Database, submit) -> None:
    ids = submit(60)

    def work(worker: int) -> list[str]:
        mine: list[str] = []
        while got := database.transact(partial(claim, worker_id=f"w{worker}", model="tiny", limit=4)):
            mine += [item.job_id for item in got]
        return mine

    with ThreadPoolExecutor(4) as pool:
        taken = [job_id for mine in pool.map(work, range(4)) for job_id in mine]
    # PostgreSQL may pass over a locked row at the very end; what is left must still be queued.
    left = rows.jobs_by_state(database).get("queued", [])
    assert sorted(taken + left) == ids


@pytest.mark.parametrize("tiers", [(0, 0), (0, 2), (3, 3)])
def test_the_claim_is_an_index_scan(database: Database, submit, tiers: tuple[int, int]) -> None:
    submit(1)
    if not database.is_sqlite:
        return
    with database.read() as connection:
        plan = connection.exec_driver_sql(
            "EXPLAIN QUERY PLAN SELECT id FROM jobs WHERE model = ? AND tier >= ? AND tier <= ? "
            "AND jobs.state = 'queued' ORDER BY tier, fair_tag, prefix_group, id LIMIT 10",
            ("tiny", *tiers),
        ).all()
    details = " ".join(str(row[-1]) for row in plan)
    assert "ix_jobs_claim" in details
    assert "TEMP B-TREE" not in details


def test_the_background_is_all_that_its_claim_takes(database: Database, settings: Settings) -> None:
    """What has just been queued before it is left to a claim of its own."""
    intake = Intake(database, settings)
    for tier in (Tier.NORMAL, Tier.BACKGROUND):
        intake.accept_one(JobBody(prompt="x"), OPERATOR, terms=Terms(tier=tier))
    background = (Tier.BACKGROUND, Tier.BACKGROUND)
    taken = database.transact(partial(claim, worker_id="w", model="tiny", limit=9, tiers=background))
    assert [one.tier for one in taken] == [Tier.BACKGROUND]


def test_a_job_has_started_when_it_was_first_claimed(database: Database, submit) -> None:
    (job_id,) = submit(1)
    take = partial(claim, worker_id="w", model="tiny", limit=1)
    database.transact(take)
    first = rows.job(database, job_id).started_at
    back = [Outcome(job_id=job_id, fence=1, kind="released")]
    database.transact(partial(record, worker_id="w", outcomes=back))
    database.transact(take)
    assert rows.job(database, job_id).started_at == first
