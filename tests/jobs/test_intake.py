"""Jobs enter SQL once, whole, in order, whichever door they came through."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import select

from engine.request import derive_seed
from jobs.bad_field import BadField
from jobs.body import JobBody, parse_job
from jobs.database import Database
from jobs.drafts import prefix_group
from jobs.intake import Intake, TaskMessage, check_task_id
from jobs.job_rows import new_id
from jobs.leases import register
from jobs.models import Batch, Job
from jobs.reads import Reads
from jobs.settings import Settings
from jobs.states import BatchState, JobState
from jobs.tenants import OPERATOR
from jobs.terms import Terms, Tier
from tests.support import rows
from tests.support.invariants import check_tallies


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    return Intake(database, settings)


def message(task_id: object, body: JobBody) -> TaskMessage:
    return TaskMessage(task_id, body, "default")  # type: ignore[arg-type]


def bodies(count: int) -> list[JobBody]:
    return [JobBody(prompt=f"text {i}", custom_id=f"row-{i}") for i in range(count)]


def test_one_job(database: Database, intake: Intake) -> None:
    body = JobBody(prompt="a\x00b", custom_id="c", metadata={"k": "v"}, temperature=0.5)
    row = rows.job(database, intake.accept_one(body, OPERATOR))
    assert row.id.startswith("job_")
    assert (row.state, row.source, row.model, row.tenant, row.tier) == (
        JobState.QUEUED,
        "http",
        "tiny",
        "default",
        2,
    )
    assert row.body == {
        "prompt": "a\x00b",
        "custom_id": "c",
        "metadata": {"k": "v"},
        "temperature": 0.5,
        "model": "tiny",
    }
    assert (row.custom_id, row.metadata, row.batch_id, row.position) == ("c", {"k": "v"}, None, 0)
    assert (row.fence, row.crashes, row.worker_id, row.error) == (0, 0, None, None)
    assert row.seed == derive_seed("job", row.id)
    assert (row.fair_tag, row.priority, row.not_before, row.deadline, row.retry) == (0.0, 0, None, None, None)
    assert (row.started_at, row.finished_at) == (None, None)


def test_a_seed_that_is_given_is_kept(database: Database, intake: Intake) -> None:
    assert rows.job(database, intake.accept_one(JobBody(prompt="a", seed=-7), OPERATOR)).seed == -7


def test_a_batch_keeps_its_order_and_comes_whole(database: Database, intake: Intake) -> None:
    batch_id = intake.accept_many(bodies(1_203), OPERATOR, {"night": "monday"})
    with database.read() as connection:
        batch = connection.execute(select(Batch.__table__)).one()
        jobs = connection.execute(select(Job.__table__).order_by(Job.position)).all()
    assert (batch.id, batch.state, batch.total, batch.metadata) == (
        batch_id,
        BatchState.IN_PROGRESS,
        1_203,
        {"night": "monday"},
    )
    assert (batch.endpoint, batch.cancelling_at, batch.finished_at) == ("/v1/jobs", None, None)
    assert [job.custom_id for job in jobs] == [f"row-{i}" for i in range(1_203)]
    assert [job.position for job in jobs] == list(range(1_203))
    assert sorted(job.id for job in jobs) == [job.id for job in jobs], "ids sort like positions"
    assert {job.batch_id for job in jobs} == {batch_id}
    assert {job.created_at for job in jobs} == {batch.created_at} or max(job.created_at for job in jobs) < (
        batch.created_at + 1
    )
    assert len({job.seed for job in jobs}) == 1_203


def test_a_new_job_is_shown_as_it_is_read(database: Database, intake: Intake) -> None:
    later = Terms(tier=Tier.BACKGROUND, priority=2, not_before=time.time() + 900)
    body = JobBody(prompt="a", custom_id="c", metadata={"k": "v"})
    for terms in (Terms(), Terms(deadline=time.time() + 9e6), later):
        shown = intake.accept_new(body, OPERATOR, terms=terms)
        assert shown == Reads(database).job(shown.id, tenant=OPERATOR.tenant)


def test_an_empty_batch_is_refused(intake: Intake) -> None:
    with pytest.raises(BadField) as caught:
        intake.accept_many([], OPERATOR)
    assert caught.value.param == "jobs"


def test_a_batch_with_a_job_that_cannot_be_placed_leaves_nothing(
    database: Database, tmp_path: object
) -> None:
    intake = Intake(database, Settings())
    with pytest.raises(BadField) as caught:
        intake.accept_many([JobBody(prompt="a", model="m"), JobBody(prompt="b")], OPERATOR)
    assert caught.value.param == "jobs[1].model"
    assert rows.jobs_by_state(database) == {}


def test_the_model_is_the_jobs_own_then_the_configured_then_the_only_served(database: Database) -> None:
    configured = Intake(database, Settings(model="folder/tiny-1.gguf"))
    assert configured.default_model() == "tiny-1"
    bare = Intake(database, Settings())
    assert bare.default_model() is None
    with pytest.raises(BadField) as caught:
        bare.accept_one(JobBody(prompt="a"), OPERATOR)
    assert (caught.value.param, caught.value.code) == ("model", "missing_required_parameter")
    with database.write() as connection:
        register(connection, worker_id="w1", model="alpha", lease_seconds=60)
        register(connection, worker_id="w2", model="alpha", lease_seconds=60)
        register(connection, worker_id="w3", model="gone", lease_seconds=-1)
    assert bare.default_model() == "alpha"
    assert rows.job(database, bare.accept_one(JobBody(prompt="a"), OPERATOR)).model == "alpha"
    assert rows.job(database, bare.accept_one(JobBody(prompt="a", model="beta"), OPERATOR)).model == "beta"
    with database.write() as connection:
        register(connection, worker_id="w4", model="omega", lease_seconds=60)
    assert bare.default_model() is None


def test_a_message_that_comes_twice_makes_one_job(
    database: Database, intake: Intake, settings: Settings
) -> None:
    first = parse_job({"prompt": "first"}, settings)
    second = parse_job({"prompt": "second"}, settings)
    assert intake.accept_messages([message("task-1", first), message("task-2", first)]) == {}
    assert intake.accept_messages([message("task-2", second), message("task-3", first)]) == {}
    assert intake.accept_messages([message("task-4", first), message("task-4", second)]) == {}
    assert rows.job(database, "task-4").body["prompt"] == "first"
    assert rows.jobs_by_state(database) == {"queued": ["task-1", "task-2", "task-3", "task-4"]}
    row = rows.job(database, "task-2")
    assert (row.source, row.body["prompt"]) == ("redis", "first")


def test_an_invalid_message_becomes_a_failed_job(database: Database, intake: Intake) -> None:
    intake.accept_invalid("task-1", BadField("n", "must be an integer", "invalid_type").as_error(), "default")
    row = rows.job(database, "task-1")
    assert (row.state, row.source, row.batch_id) == (JobState.FAILED, "redis", None)
    assert row.error == {"code": "invalid_type", "message": "must be an integer", "param": "n"}
    assert row.finished_at == row.created_at
    intake.accept_invalid("task-1", BadField("n", "again").as_error(), "default")
    assert rows.job(database, "task-1").error["message"] == "must be an integer"


@pytest.mark.parametrize("task_id", [None, 1, "", "x" * 256, "a\x00b", "a\nb", " a", "a\ud800"])
def test_task_ids_that_no_key_can_be(database: Database, intake: Intake, task_id: object) -> None:
    with pytest.raises(BadField) as caught:
        check_task_id(task_id)
    assert caught.value.param == "task_id"
    with pytest.raises(BadField):
        intake.accept_messages([message("good", JobBody(prompt="a")), message(task_id, JobBody(prompt="a"))])
    assert rows.jobs_by_state(database) == {}


def test_task_ids_of_all_sorts_are_keys() -> None:
    for task_id in ("1", "x" * 255, "6f0d2a52-0e43-4d55-8f5f-54c3ff0c1f6c", "Ärger mit IDs/ß"):
        assert check_task_id(task_id) == task_id


def test_ids_sort_by_time_then_position() -> None:
    ids = [new_id("job", position) for position in (0, 1, 9, 10, 255, 256, 10_000)]
    assert ids == sorted(ids)
    assert len({new_id("job") for _ in range(1_000)}) == 1_000
    assert all(len(one) == len("job_") + 32 for one in ids)


def test_a_prefix_group_is_the_start_of_the_text_and_the_model() -> None:
    long = "s" * 256
    assert prefix_group("m", long + "a") == prefix_group("m", long + "b")
    assert prefix_group("m", long) != prefix_group("other", long)
    assert prefix_group("m", "a") != prefix_group("m", "b")
    assert 0 <= prefix_group("m", "") < 2**63


def test_one_message_that_several_workers_receive_counts_once(database: Database, intake: Intake) -> None:
    for number in range(5):
        messages = [message(f"{number}-{i}", JobBody(prompt="a")) for i in range(20)]
        gate = threading.Barrier(4)

        def receive(messages: list[TaskMessage] = messages, gate: threading.Barrier = gate) -> None:
            gate.wait()
            intake.accept_messages(messages)

        threads = [threading.Thread(target=receive) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(rows.jobs_by_state(database)["queued"]) == 20 * (number + 1)
        with database.read() as connection:
            check_tallies(connection)
