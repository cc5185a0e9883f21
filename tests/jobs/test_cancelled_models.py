"""A model is cancelled while files are read whose lines name it: none of them waits for it for ever."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from jobs import batch_intake
from jobs.cancels import Cancels
from jobs.database import Database
from jobs.settings import Settings
from jobs.states import BatchState, JobState
from tests.support.batch_lines import Bench, chat_line, insert_one_chunk, jsonl, run
from tests.support.invariants import check_invariants, check_tallies


@pytest.fixture
def bench(database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(batch_intake, "CHUNK", 3)
    return Bench(database, settings)


def mixed(count: int) -> bytes:
    """Lines of `tiny` and `other` in turn."""
    return jsonl([chat_line(i, model=("tiny", "other")[i % 2]) for i in range(count)])


def states(bench: Bench, batch_id: str) -> Counter[tuple[str, str]]:
    with bench.database.read() as connection:
        check_tallies(connection)
    return Counter((job.model, job.state) for job in bench.jobs(batch_id))


def test_lines_that_come_later_are_cancelled_and_the_batch_ends(bench: Bench) -> None:
    batch_id = bench.create(8)
    insert_one_chunk(bench, batch_id)
    assert Cancels(bench.database).cancel_model("tiny") == ({JobState.CANCELLED: 3}, 1)
    assert bench.batch(batch_id).state == BatchState.IN_PROGRESS, "its lines are told in its error file"
    bench.work()
    assert states(bench, batch_id) == {("tiny", "cancelled"): 8}
    batch = bench.batch(batch_id)
    assert (batch.state, batch.output_file_id) == (BatchState.COMPLETED, None)
    errors = bench.lines(batch.error_file_id)
    assert [line["custom_id"] for line in errors] == [f"line-{i}" for i in range(8)]
    assert {line["error"]["code"] for line in errors} == {"request_cancelled"}
    check_invariants(bench.database, [])
    assert Cancels(bench.database).cancel_model("tiny") == ({}, 0)


def test_lines_of_other_models_run(bench: Bench) -> None:
    batch_id = bench.create(mixed(8))
    insert_one_chunk(bench, batch_id)
    for _ in range(2):
        num_files = Cancels(bench.database).cancel_model("other").num_files
        assert num_files == 1
    bench.work()
    assert states(bench, batch_id) == {("tiny", "queued"): 4, ("other", "cancelled"): 4}
    run(bench.database)
    bench.work()
    batch = bench.batch(batch_id)
    assert batch.state == BatchState.COMPLETED
    assert len(bench.lines(batch.output_file_id)) == len(bench.lines(batch.error_file_id)) == 4


def test_a_file_that_nobody_has_checked_yet_is_heeded(bench: Bench) -> None:
    batch_id = bench.create(mixed(4))
    cancels = Cancels(bench.database)
    assert cancels.cancel_model("tiny") == ({}, 1)
    assert cancels.cancel_model("other") == ({}, 1)
    later = bench.create(1)
    bench.work()
    assert states(bench, batch_id) == {("tiny", "cancelled"): 2, ("other", "cancelled"): 2}
    assert bench.batch(batch_id).state == BatchState.COMPLETED
    assert states(bench, later) == {("tiny", "queued"): 1}, (
        "who hands in afterwards is told that nobody serves it"
    )


def test_files_of_other_models_are_left_alone(bench: Bench) -> None:
    batch_id = bench.create(8)
    insert_one_chunk(bench, batch_id)
    before = bench.batch(batch_id)
    assert Cancels(bench.database).cancel_model("other") == ({}, 0)
    assert bench.batch(batch_id) == before


def test_a_cancel_that_meets_the_insertion_leaves_no_line_behind(bench: Bench) -> None:
    for count in range(20, 25):
        batch_id = bench.create(count)
        clerk = threading.Thread(target=bench.work)
        clerk.start()
        Cancels(bench.database).cancel_model("tiny")
        clerk.join()
        bench.work()  # the clerk passes over a batch whose row somebody holds, and would look again in a moment
        assert states(bench, batch_id) == {("tiny", "cancelled"): count}
        assert bench.batch(batch_id).state == BatchState.COMPLETED
