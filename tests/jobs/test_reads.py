"""Reads: pages that lose and repeat nothing, counts and usage that equal the rows, results while they grow."""

from __future__ import annotations

import os
import socket
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import update

from jobs.bad_field import BadField
from jobs.batch_reads import BatchReads
from jobs.body import JobBody
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.database import Database
from jobs.dialects import now
from jobs.intake import Intake
from jobs.leases import register
from jobs.models import Job, Worker
from jobs.outcomes import Outcome, record
from jobs.reads import CHUNK, JobFilter, Reads, Usage
from jobs.settings import Settings
from jobs.states import BatchState, JobState, WorkerState
from jobs.tenants import OPERATOR
from jobs.terms import Terms, Tier

WORKER = "w"
OUTPUTS = [{"index": 0, "text": "out", "finish_reason": "stop", "stop_reason": None}]


@pytest.fixture
def reads(database: Database) -> Reads:
    return Reads(database)


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    return Intake(database, settings)


def worker(database: Database, name: str = WORKER, *, model: str = "tiny", **columns: Any) -> None:
    with database.write() as connection:
        register(connection, worker_id=name, model=model, lease_seconds=60)
        connection.execute(
            update(Worker).where(Worker.id == name).values(**{"state": WorkerState.READY, **columns})
        )


def run(database: Database, limit: int, kind: str = "completed") -> list[str]:
    """Claim and end so many jobs; job k of them has k prompt tokens, 10 more completion tokens, 1 cached."""
    with database.write() as connection:
        claims = claim(connection, worker_id=WORKER, model="tiny", limit=limit)
        outcomes = [
            Outcome(
                job_id=one.job_id,
                fence=one.fence,
                kind=kind,  # type: ignore[arg-type]
                outputs=OUTPUTS,
                error={"code": "numerics", "message": "NaN"} if kind == "failed" else None,
                prompt_tokens=k,
                completion_tokens=k + 10,
                cached_tokens=1,
            )
            for k, one in enumerate(claims)
        ]
        record(connection, worker_id=WORKER, outcomes=outcomes)
    return [one.job_id for one in claims]


def test_a_job_from_queued_to_completed(database: Database, intake: Intake, reads: Reads) -> None:
    job_id = intake.accept_one(JobBody(prompt="a", custom_id="c", metadata={"k": "v"}), OPERATOR)
    job = reads.job(job_id, tenant="default")
    assert job is not None
    assert (job.id, job.state, job.model, job.custom_id, job.metadata) == (
        job_id,
        JobState.QUEUED,
        "tiny",
        "c",
        {"k": "v"},
    )
    assert (job.outputs, job.usage, job.error, job.attempts, job.started_at) == (None, None, None, 0, None)
    worker(database)
    run(database, 1)
    job = reads.job(job_id, tenant="default")
    assert job is not None
    assert (job.state, job.outputs, job.usage, job.attempts) == (
        JobState.COMPLETED,
        OUTPUTS,
        Usage(0, 10, 1),
        1,
    )
    assert job.created_at <= (job.started_at or 0) <= (job.finished_at or 0)
    assert reads.job("job_unknown", tenant="default") is None


def test_a_failed_job_has_its_error(database: Database, intake: Intake, reads: Reads) -> None:
    job_id = intake.accept_one(JobBody(prompt="a"), OPERATOR)
    worker(database)
    run(database, 1, kind="failed")
    job = reads.job(job_id, tenant="default")
    assert job is not None
    assert (job.state, job.outputs, job.usage) == (JobState.FAILED, None, None)
    assert job.error == {"code": "numerics", "message": "NaN"}


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_hold_every_job_once_and_in_order(intake: Intake, reads: Reads, order: Any) -> None:
    intake.accept_many([JobBody(prompt="a")] * 23, OPERATOR)
    intake.accept_one(JobBody(prompt="b"), OPERATOR)
    seen: list[str] = []
    after = None
    while True:
        page, more = reads.jobs(JobFilter(), tenant="default", after=after, limit=5, direction=order)
        seen += [job.id for job in page]
        if not more:
            break
        assert len(page) == 5
        after = page[-1].id
        intake.accept_one(JobBody(prompt="meanwhile"), OPERATOR)  # shifts no page
        if len(seen) > 60:
            break
    assert len(seen) == len(set(seen))
    if order == "desc":
        assert len(seen) == 24
        assert seen == sorted(seen, reverse=True)
    else:
        assert len(seen) > 24


def test_a_list_is_narrowed_by_every_filter(database: Database, intake: Intake, reads: Reads) -> None:
    batch_id = intake.accept_many([JobBody(prompt="a", custom_id=f"c{i % 2}") for i in range(4)], OPERATOR)
    other = intake.accept_one(JobBody(prompt="b", model="other", custom_id="c0"), OPERATOR)
    Cancels(database).cancel_job(other, tenant="default")

    def found(**only: Any) -> int:
        return len(reads.jobs(JobFilter(**only), tenant="default", limit=100)[0])

    assert found() == 5
    assert found(state=JobState.QUEUED) == 4
    assert found(state=JobState.CANCELLED) == 1
    assert found(batch_id=batch_id) == 4
    assert found(batch_id="nope") == 0
    assert found(model="other") == 1
    assert found(custom_id="c0") == 3
    assert found(custom_id="c0", batch_id=batch_id) == 2
    job = reads.job(other, tenant="default")
    assert job is not None
    assert found(created_after=job.created_at) == 0
    assert found(created_before=job.created_at + 1) == 5
    assert found(created_after=job.created_at - 60, created_before=job.created_at + 60) == 5
    with pytest.raises(BadField) as caught:
        reads.jobs(JobFilter(), tenant="default", after="job_unknown")
    assert caught.value.param == "after"


def test_a_batch_counts_its_jobs_and_bills_its_results(database: Database, intake: Intake) -> None:
    batch_id = intake.accept_many([JobBody(prompt="a")] * 6, OPERATOR, {"k": "v"})
    worker(database)
    run(database, 3)
    run(database, 1, kind="failed")
    with database.write() as connection:
        claim(connection, worker_id=WORKER, model="tiny", limit=1)
    batch = BatchReads(database).batch(batch_id, tenant="default")
    assert batch is not None
    assert (batch.total, batch.state, batch.metadata, batch.closed) == (
        6,
        BatchState.IN_PROGRESS,
        {"k": "v"},
        False,
    )
    assert Counter(batch.counts) == Counter(
        {JobState.COMPLETED: 3, JobState.FAILED: 1, JobState.IN_PROGRESS: 1, JobState.QUEUED: 1}
    )
    assert batch.usage == Usage(0 + 1 + 2, 10 + 11 + 12, 3), "the failed attempt is not billed"
    assert BatchReads(database).batch("batch_unknown", tenant="default") is None


def test_results_come_in_input_order_and_grow(database: Database, intake: Intake, reads: Reads) -> None:
    count = 2 * CHUNK + 7
    batch_id = intake.accept_many([JobBody(prompt="a", custom_id=str(i)) for i in range(count)], OPERATOR)
    intake.accept_many([JobBody(prompt="another batch")], OPERATOR)
    worker(database)
    assert list(reads.results(batch_id, tenant="default")) == []
    done = set(run(database, CHUNK + 3))
    first = list(reads.results(batch_id, tenant="default"))
    assert {job.id for job in first} <= done
    assert [job.position for job in first] == sorted(job.position for job in first)
    while run(database, CHUNK):
        pass
    assert [job.custom_id for job in reads.results(batch_id, tenant="default")] == [
        str(i) for i in range(count)
    ]
    batch = BatchReads(database).batch(batch_id, tenant="default")
    assert batch is not None
    assert batch.closed
    assert batch.usage.completion == sum(
        job.usage.completion for job in reads.results(batch_id, tenant="default") if job.usage
    )


def test_without_work_the_service_is_ready(reads: Reads) -> None:
    readiness = reads.readiness(60)
    assert (readiness.ready, readiness.has_work, readiness.num_workers) == (True, False, {})


def test_work_without_a_worker_is_not_ready(database: Database, intake: Intake, reads: Reads) -> None:
    job_id = intake.accept_one(JobBody(prompt="a"), OPERATOR)
    readiness = reads.readiness(60)
    assert (readiness.ready, readiness.has_work) == (False, True)
    assert "no worker" in str(readiness.reason)
    worker(database, "late", lease_until=now() - 1)
    assert not reads.readiness(60).ready
    worker(database, "gone", state=WorkerState.STOPPED)
    assert not reads.readiness(60).ready
    Cancels(database).cancel_job(job_id, tenant="default")
    assert reads.readiness(60).ready


def test_a_worker_that_loads_is_not_ready_and_one_that_moves_is(
    database: Database, intake: Intake, reads: Reads
) -> None:
    intake.accept_one(JobBody(prompt="a"), OPERATOR)
    worker(database, state=WorkerState.STARTING)
    readiness = reads.readiness(60)
    assert not readiness.ready
    assert "loading" in str(readiness.reason)
    with database.write() as connection:
        connection.execute(update(Worker).values(state=WorkerState.READY))
    readiness = reads.readiness(60)
    assert readiness.ready
    assert (readiness.num_workers, readiness.models) == ({WorkerState.READY: 1}, ("tiny",))


def test_a_worker_that_dies_of_loading_is_told_from_one_that_loads(
    database: Database, intake: Intake, reads: Reads
) -> None:
    """Whoever is called at night need not wait for it."""
    intake.accept_one(JobBody(prompt="a"), OPERATOR)
    worker(database, "yesterday", lease_until=now() - 80_000, engine_starts=9)
    worker(database, state=WorkerState.STARTING, engine_starts=2)
    assert str(reads.readiness(60).reason).endswith("still loading its model")
    with database.write() as connection:
        connection.execute(update(Worker).where(Worker.id == WORKER).values(engine_starts=4))
    assert "loading its model, after 4 starts of its engine: the worker's log" in str(
        reads.readiness(60).reason
    )
    with database.write() as connection:
        connection.execute(
            update(Worker).where(Worker.id == WORKER).values(lease_until=now() - 20, engine_starts=1)
        )
    assert str(reads.readiness(60).reason).endswith(
        "no worker is alive to take them; start one, or give them up: nightpress cancel --model tiny"
    )
    for name in "abc":  # whatever starts workers does so again and again
        worker(database, name, state=WorkerState.STOPPED, lease_until=now() - 10, engine_starts=0)
    assert "alive to take them, after 4 starts of its engine" in str(reads.readiness(60).reason)


def test_a_busy_engine_without_steps_is_not_ready(database: Database, intake: Intake, reads: Reads) -> None:
    intake.accept_one(JobBody(prompt="a"), OPERATOR)
    worker(database, num_running=3, last_step_at=now() - 100)
    with database.write() as connection:
        connection.execute(update(Job).values(state=JobState.IN_PROGRESS, worker_id=WORKER))
    assert reads.readiness(120).ready
    readiness = reads.readiness(60)
    assert (readiness.ready, readiness.has_work) == (False, True)
    assert "60 seconds" in str(readiness.reason)
    worker(database, "second")
    assert reads.readiness(60).ready, "another worker moves"


def test_work_of_one_model_is_not_done_by_workers_of_another(
    database: Database, intake: Intake, reads: Reads
) -> None:
    worker(database, "second", model="m2")
    worker(database, "third", model="m3", lease_until=now() - 1)
    intake.accept_one(JobBody(prompt="a", model="m2"), OPERATOR)
    intake.accept_one(JobBody(prompt="a", model="invented"), OPERATOR)
    later = Terms(tier=Tier.NORMAL, not_before=4e9)
    intake.accept_one(JobBody(prompt="a", model="m3"), OPERATOR, terms=later)
    assert reads.readiness(60).ready, (
        "what may not start yet waits for nobody, and no worker ever had the other"
    )
    job_id = intake.accept_one(JobBody(prompt="a", model="m3"), OPERATOR)
    readiness = reads.readiness(60)
    assert (readiness.ready, readiness.has_work, readiness.models) == (False, True, ("m2",))
    assert str(readiness.reason).startswith("m3: jobs are waiting and no worker is alive to take them; start")
    worker(database, "fourth", model="m3", state=WorkerState.STARTING)
    assert "m3: jobs are waiting and the worker is still loading" in str(reads.readiness(60).reason)
    with database.write() as connection:
        stuck = update(Worker).where(Worker.id == "fourth")
        connection.execute(stuck.values(state=WorkerState.READY, num_running=1, last_step_at=now() - 100))
        held = update(Job).where(Job.id == job_id)
        connection.execute(held.values(state=JobState.IN_PROGRESS, worker_id="fourth"))
    assert reads.readiness(120).ready
    assert "m3: no step of any engine in the last 60 seconds" in str(reads.readiness(60).reason)
    worker(database, "fifth", model="m3")
    assert reads.readiness(60).ready


def test_one_worker_process_is_told_from_another(database: Database, reads: Reads) -> None:
    host, pid = socket.gethostname(), os.getpid()
    assert not reads.is_worker_ready(host, pid)
    worker(database, state=WorkerState.STARTING)
    assert not reads.is_worker_ready(host, pid)
    worker(database, "second")
    assert reads.is_worker_ready(host, pid)
    assert not reads.is_worker_ready(host, pid + 1)
    assert not reads.is_worker_ready("elsewhere", pid)
    with database.write() as connection:
        connection.execute(update(Worker).values(lease_until=now() - 1))
    assert not reads.is_worker_ready(host, pid)


def test_what_is_anothers_is_not_there(database: Database, intake: Intake, reads: Reads) -> None:
    batch_id = intake.accept_many([JobBody(prompt="a")], OPERATOR)
    (job_id,) = run(database, 1)
    assert reads.job(job_id, tenant="default") is not None
    assert reads.job(job_id, tenant="other") is None
    assert BatchReads(database).batch(batch_id, tenant="other") is None
    assert len(list(reads.results(batch_id, tenant="default"))) == 1
    assert list(reads.results(batch_id, tenant="other")) == []
    assert reads.jobs(JobFilter(), tenant="other") == ([], False)
    assert reads.jobs(JobFilter(batch_id=batch_id), tenant="other") == ([], False)
    with pytest.raises(BadField):
        reads.jobs(JobFilter(), tenant="other", after=job_id)
    cancels = Cancels(database)
    assert cancels.cancel_job(job_id, tenant="other") is None
    assert cancels.cancel_batch(batch_id, tenant="other") is None
