"""How a batch of a file ends before its time: cancelled in every state, expired, or its file lost."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from jobs import batch_intake, cancels
from jobs.batches import close_batches
from jobs.cancels import Cancels
from jobs.clerk import Clerk
from jobs.database import Database
from jobs.desk import take
from jobs.dialects import now
from jobs.models import Job
from jobs.settings import Settings
from jobs.states import BatchState, JobState
from jobs.sweeper import Sweeper
from jobs.tallies import used
from jobs.tenants import DEFAULT
from tests.support.batch_lines import Bench, insert_one_chunk, run
from tests.support.databases import ON_SQLITE
from tests.support.invariants import check_invariants, check_tallies


@pytest.fixture
def bench(database: Database, settings: Settings) -> Bench:
    return Bench(database, settings)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_intake, "CHUNK", 3)


def check(bench: Bench) -> None:
    with bench.database.read() as connection:
        check_tallies(connection)


def cancel(bench: Bench, batch_id: str) -> BatchState | None:
    return Cancels(bench.database).cancel_batch(batch_id, tenant=DEFAULT)


# --- cancels --------------------------------------------------------------------------------------------------


def test_cancel_while_it_is_being_checked(bench: Bench) -> None:
    batch_id = bench.create(3)
    lease = take(bench.database, 60)
    assert lease is not None
    assert cancel(bench, batch_id) is BatchState.CANCELLED
    bench.batches.validate(lease)
    lease.release()
    assert cancel(bench, batch_id) is BatchState.CANCELLED
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.output_file_id, batch.error_file_id) == (BatchState.CANCELLED, None, None)
    assert batch.cancelling_at <= batch.finished_at
    assert bench.jobs(batch_id) == []
    check_invariants(bench.database, [])


@pytest.mark.usefixtures("small_chunks")
def test_cancel_in_the_middle_of_the_insertion(bench: Bench) -> None:
    batch_id = bench.create(8)
    insert_one_chunk(bench, batch_id)
    run(bench.database, 1)
    assert cancel(bench, batch_id) is BatchState.CANCELLING, "its output is not written yet"
    check(bench)
    with bench.database.read() as connection:
        assert used(connection, DEFAULT).queued_jobs == 0
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.num_inserted, batch.total) == (BatchState.CANCELLED, 3, 8)
    (done,) = bench.lines(batch.output_file_id)
    errors = bench.lines(batch.error_file_id)
    rest = [f"line-{i}" for i in range(8) if f"line-{i}" != done["custom_id"]]
    assert [line["custom_id"] for line in errors] == rest
    assert {(line["response"], line["error"]["code"]) for line in errors} == {(None, "batch_cancelled")}
    assert len({line["id"] for line in errors}) == 7
    check_invariants(bench.database, [])


@pytest.mark.usefixtures("small_chunks")
def test_cancel_between_two_chunks_of_a_clerk_that_lives(bench: Bench) -> None:
    batch_id = bench.create(8)
    told: list[BatchState | None] = []
    clerk = Clerk(bench.database, bench.settings, lambda model: told.append(cancel(bench, batch_id)))
    assert clerk.work_once()
    assert told == [BatchState.CANCELLING]
    batch = bench.batch(batch_id)
    assert (batch.num_inserted, batch.next_offset) == (3, None)
    assert {job.state for job in bench.jobs(batch_id)} == {JobState.CANCELLED}
    check(bench)
    assert cancel(bench, batch_id) is BatchState.CANCELLING
    assert bench.batch(batch_id).finalizing_at == batch.finalizing_at, "a second cancel changes nothing"
    bench.work()
    assert bench.batch(batch_id).state == BatchState.CANCELLED
    assert len(bench.lines(bench.batch(batch_id).error_file_id)) == 8
    check_invariants(bench.database, [])


def test_cancel_while_a_worker_holds_a_job(bench: Bench) -> None:
    batch_id = bench.create(3)
    bench.work()
    with bench.database.write() as connection:  # held by a worker
        held = bench.jobs(batch_id)[0].id
        connection.execute(
            update(Job).where(Job.id == held).values(state=JobState.IN_PROGRESS, worker_id="w", fence=1)
        )
    assert cancel(bench, batch_id) is BatchState.CANCELLING
    bench.work()
    assert bench.batch(batch_id).state == BatchState.CANCELLING, "a job is still held"
    with bench.database.write() as connection:
        connection.execute(
            update(Job)
            .where(Job.id == held)
            .values(state=JobState.CANCELLED, worker_id=None, finished_at=now())
        )
        close_batches(connection, [batch_id])
    assert bench.batch(batch_id).state == BatchState.CANCELLING
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.output_file_id) == (BatchState.CANCELLED, None)
    assert len(bench.lines(batch.error_file_id)) == 3


def test_cancel_while_the_output_is_written(bench: Bench) -> None:
    batch_id = bench.create(2)
    bench.work()
    run(bench.database)
    lease = take(bench.database, 60)
    assert lease is not None
    assert cancel(bench, batch_id) is BatchState.CANCELLING
    lease.release()
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.error_file_id) == (BatchState.CANCELLED, None)
    assert len(bench.lines(batch.output_file_id)) == 2, "what was done is kept"
    check_invariants(bench.database, [])


@ON_SQLITE
def test_a_closed_batch_stays_as_it_is(bench: Bench) -> None:
    done, failed = bench.create(1), bench.create(b"{}")
    bench.work()
    run(bench.database)
    bench.work()
    for batch_id, state in ((done, BatchState.COMPLETED), (failed, BatchState.FAILED)):
        before = bench.batch(batch_id)
        assert cancel(bench, batch_id) is state
        assert bench.batch(batch_id) == before
    assert Cancels(bench.database).cancel_batch(done, tenant="other") is None


@ON_SQLITE
def test_a_job_that_was_cancelled_alone(bench: Bench) -> None:
    batch_id = bench.create(2)
    bench.work()
    Cancels(bench.database).cancel_job(bench.jobs(batch_id)[0].id, tenant=DEFAULT)
    run(bench.database)
    bench.work()
    batch = bench.batch(batch_id)
    assert batch.state == BatchState.COMPLETED
    assert bench.lines(batch.error_file_id)[0]["error"]["code"] == "request_cancelled"


# --- the window -----------------------------------------------------------------------------------------------


def test_a_batch_whose_time_runs_out(bench: Bench) -> None:
    batch_id = bench.create(3)
    bench.work()
    run(bench.database, 1)
    bench.change(batch_id, expires_at=1.0)
    with bench.database.write() as connection:  # as a sweeper ends what is past its deadline
        left = [job.id for job in bench.jobs(batch_id) if job.state == JobState.QUEUED]
        connection.execute(
            update(Job).where(Job.id.in_(left)).values(state=JobState.EXPIRED, finished_at=now())
        )
        close_batches(connection, [batch_id])
    assert bench.batch(batch_id).state == BatchState.FINALIZING
    bench.work()
    batch = bench.batch(batch_id)
    assert batch.state == BatchState.EXPIRED
    assert len(bench.lines(batch.output_file_id)) == 1, "what was done is kept"
    assert [line["error"]["code"] for line in bench.lines(batch.error_file_id)] == ["batch_expired"] * 2


@ON_SQLITE
def test_a_late_end_without_expired_jobs_is_no_expiry(bench: Bench) -> None:
    batch_id = bench.create(2)
    bench.work()
    run(bench.database)
    bench.change(batch_id, expires_at=1.0)
    bench.work()
    assert bench.batch(batch_id).state == BatchState.COMPLETED


@pytest.mark.usefixtures("small_chunks")
def test_time_that_runs_out_in_the_middle_of_the_insertion(bench: Bench) -> None:
    batch_id = bench.create(8)
    insert_one_chunk(bench, batch_id)
    run(bench.database)
    bench.change(batch_id, expires_at=1.0)
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.num_inserted) == (BatchState.EXPIRED, 3)
    assert [line["custom_id"] for line in bench.lines(batch.error_file_id)] == [
        f"line-{i}" for i in range(3, 8)
    ]
    check_invariants(bench.database, [])


# --- files that get lost ----------------------------------------------------------------------------------------


@ON_SQLITE
def test_an_input_that_is_gone_from_disk(bench: Bench) -> None:
    batch_id = bench.create(3)
    bench.files.store.remove(bench.batch(batch_id).input_file_id)
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.errors[0]["code"]) == (BatchState.FAILED, "file_lost")
    check_invariants(bench.database, [])


@ON_SQLITE
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_an_input_that_is_damaged_between_the_passes(bench: Bench, damage: str) -> None:
    batch_id = bench.create(8)
    insert_one_chunk(bench, batch_id)
    path = bench.settings.files / bench.batch(batch_id).input_file_id
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:5]))
    else:
        path.write_bytes(path.read_bytes().replace(b'"line-5"', b'"line-5'))
    bench.work()
    run(bench.database)
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.errors[0]["code"]) == (BatchState.FAILED, "file_lost")
    assert len(bench.lines(batch.output_file_id)) == batch.num_inserted == 3
    check(bench)


# --- a cancel that is cut off ---------------------------------------------------------------------------------


def cut_off(bench: Bench, batch_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The api dies between the two transactions of a cancel."""

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(cancels, "_cancel_batch", die)
        with pytest.raises(Killed):
            cancel(bench, batch_id)


def sweep(bench: Bench) -> None:
    Sweeper(bench.database, 1.0, lambda model: None).sweep()


@pytest.mark.usefixtures("small_chunks")
def test_a_cancel_cut_off_with_no_job_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = bench.create(9)
    insert_one_chunk(bench, batch_id)
    run(bench.database)
    cut_off(bench, batch_id, monkeypatch)
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, len(bench.lines(batch.output_file_id))) == (BatchState.CANCELLED, 3)
    check_invariants(bench.database, [])


def test_a_cancel_cut_off_before_its_jobs_is_finished(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = bench.create(3)
    bench.work()
    cut_off(bench, batch_id, monkeypatch)
    assert {job.state for job in bench.jobs(batch_id)} == {JobState.QUEUED}
    sweep(bench)
    assert {job.state for job in bench.jobs(batch_id)} == {JobState.CANCELLED}
    bench.work()
    assert bench.batch(batch_id).state == BatchState.CANCELLED
    check_invariants(bench.database, [])
