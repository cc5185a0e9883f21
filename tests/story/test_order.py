"""Who goes first: whoever waits for an answer, a short queue beside a long one, anybody before the background."""

from __future__ import annotations

import time

from jobs.body import parse_job
from jobs.intake import Intake
from jobs.models import Job
from jobs.settings import Settings
from jobs.states import JobState
from jobs.tenants import OPERATOR, Owner, Tenants
from jobs.terms import Terms, Tier
from tests.support.press import MODEL, Press
from tests.support.stories import long_jobs, short_jobs
from tests.support.waiting import wait_until


def ended(press: Press, job_id: str) -> bool:
    return bool(press.jobs(Job.id == job_id)[job_id].finished_at)


def test_whoever_waits_for_an_answer_passes_a_full_engine(press: Press) -> None:
    press.start_workers(1)
    settings = Settings(model=MODEL)
    bulk = press.submit(long_jobs(80, 400))  # more than the engine runs and the worker holds
    wait_until(lambda: press.held_by(press.live_workers()[0]), "the worker is busy", 30)
    body = parse_job({"prompt": "quick", "max_tokens": 4}, settings)
    job_id = Intake(press.database, settings).accept_one(body, OPERATOR, terms=Terms(tier=Tier.INTERACTIVE))
    press.accepted.add(job_id)
    press.wake()
    wait_until(lambda: ended(press, job_id), "the answer", 60)
    open_jobs = press.jobs(Job.batch_id == bulk, Job.state != JobState.COMPLETED)
    assert len(open_jobs) > 40, "it came in before the bulk was done"
    press.http.post(f"/v1/batches/{bulk}/cancel")
    press.finish()


def test_ten_jobs_do_not_wait_behind_two_thousand(press: Press) -> None:
    press.start_workers(1)
    settings = Settings(model=MODEL)
    if "small" not in {tenant.id for tenant in Tenants(press.database).all()}:
        Tenants(press.database).create("small")
    heavy = [job | {"max_tokens": 400} for job in short_jobs(1000)]
    big = press.submit(heavy)
    intake = Intake(press.database, settings)
    few = [
        intake.accept_one(parse_job({"prompt": f"few {i}", "max_tokens": 8}, settings), Owner("small", None))
        for i in range(10)
    ]
    press.accepted |= set(few)
    wait_until(lambda: all(ended(press, job_id) for job_id in few), "the ten are done", 120)
    left = len(press.jobs(Job.batch_id == big, Job.state == JobState.QUEUED))
    assert left > 500, "most of the thousand were still queued"
    press.http.post(f"/v1/batches/{big}/cancel")
    press.finish()


def test_the_background_yields_and_goes_on_as_if_nothing_had_been(press: Press) -> None:
    press.start_workers(1)
    (worker,) = press.live_workers()
    patient = press.submit(long_jobs(16, 1200), tier="background")
    wait_until(lambda: len(press.held_by(worker)) == 16, "the background fills the engine", 30)
    others = press.submit(long_jobs(40, 100))
    wait_until(lambda: press.batch(others)["status"] == "completed", "the others are done", 120)
    assert press.batch(patient)["status"] == "in_progress"
    press.finish()
    again = press.submit(long_jobs(16, 1200))
    press.finish()
    assert press.texts(again) == press.texts(patient)
    assert not [row for row in press.ledger() if row.kind == "wasted"]


def test_deadlines_and_delays(press: Press) -> None:
    press.start_workers(1)
    soon = time.time() + 3
    unasked = Settings(model=MODEL, promise_refuse=False)  # who can forecast would refuse it
    bodies = [parse_job(job, unasked) for job in long_jobs(2, 8000)]
    late = Intake(press.database, unasked).accept_many(bodies, OPERATOR, terms=Terms(deadline=soon))
    press.accepted |= set(press.jobs(Job.batch_id == late))
    press.wake()
    delayed = press.submit(short_jobs(3), not_before=soon)
    wait_until(lambda: press.batch(late)["status"] != "in_progress", "the deadline ends it", 60)
    press.finish()
    states = {row.state for row in press.jobs(Job.batch_id == late).values()}
    assert states == {JobState.EXPIRED}
    started = [row.started_at for row in press.jobs(Job.batch_id == delayed).values()]
    assert min(started) >= soon
