"""A batch that came as a file: from the check to the output, cut off at every point and gone on with by others."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from jobs import batch_intake, desk
from jobs.bad_field import BadField
from jobs.batch_intake import job_id_of
from jobs.cancels import Cancels
from jobs.database import Database
from jobs.desk import LeaseLost, take
from jobs.file_batches import NoSuchFile, parse_wish
from jobs.files import Purpose
from jobs.idempotency import KeyReusedError, Submit
from jobs.settings import Settings
from jobs.states import BatchState
from jobs.tallies import used
from jobs.tenants import DEFAULT, OPERATOR, Owner, Tenants
from tests.support.batch_lines import CHAT, COMPLETIONS, Bench, chat_line, insert_one_chunk, jsonl, run
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


def test_from_a_file_to_its_output(bench: Bench) -> None:
    batch_id = bench.create(
        5, metadata={"k": "v"}, output_expires_after={"anchor": "created_at", "seconds": 7200}
    )
    batch = bench.batch(batch_id)
    assert (batch.state, batch.total, batch.in_progress_at) == (BatchState.VALIDATING, 0, None)
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.total, batch.num_inserted) == (BatchState.IN_PROGRESS, 5, 5)
    assert batch.expires_at == pytest.approx(batch.created_at + 86_400)
    assert (batch.next_offset, batch.reserved_tokens, batch.reserved_bytes, batch.clerk) == (None, 0, 0, None)
    assert bench.announced == ["tiny"]
    jobs = bench.jobs(batch_id)
    assert [job.custom_id for job in jobs] == [f"line-{i}" for i in range(5)]
    assert [job.id for job in jobs] == sorted(job.id for job in jobs)
    assert {job.deadline for job in jobs} == {batch.expires_at}
    check(bench)
    assert run(bench.database, failing=["line-3"]) == 5
    assert bench.batch(batch_id).state == BatchState.FINALIZING
    assert bench.batch(batch_id).finished_at is None
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.model) == (BatchState.COMPLETED, "tiny")
    assert batch.finalizing_at <= batch.finished_at
    output, errors = bench.lines(batch.output_file_id), bench.lines(batch.error_file_id)
    assert [line["custom_id"] for line in output] == ["line-0", "line-1", "line-2", "line-4"]
    assert [line["id"] for line in output] == [
        f"batch_req_{job.id.removeprefix('job_')}" for job in jobs if job.custom_id != "line-3"
    ]
    for line in output:
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        answer = ChatCompletion.model_validate(line["response"]["body"])
        assert (answer.choices[0].message.content, answer.model) == ("out", "tiny")
        assert answer.usage is not None
        assert answer.usage.total_tokens == 8
    (error,) = errors
    assert (error["custom_id"], error["error"], error["response"]["status_code"]) == ("line-3", None, 400)
    assert error["response"]["body"]["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "invalid_request",
    }
    for file_id, kind in ((batch.output_file_id, "output"), (batch.error_file_id, "error")):
        file = bench.files.find(file_id, tenant=DEFAULT)
        assert file is not None
        assert (file.purpose, file.filename) == (Purpose.BATCH_OUTPUT, f"{batch_id}_{kind}.jsonl")
        assert file.bytes == (bench.settings.files / file_id).stat().st_size
        assert file.expires_at == pytest.approx(file.created_at + 7200)
    check_invariants(bench.database, [job.id for job in jobs])


@ON_SQLITE
def test_no_file_is_made_that_would_be_empty(bench: Bench) -> None:
    good, bad = bench.create(2), bench.create(jsonl([chat_line(9)]))
    bench.work()
    run(bench.database, failing=["line-9"])
    bench.work()
    assert (bench.batch(good).state, bench.batch(good).error_file_id) == (BatchState.COMPLETED, None)
    assert (bench.batch(bad).state, bench.batch(bad).output_file_id) == (BatchState.COMPLETED, None)
    assert len(bench.lines(bench.batch(bad).error_file_id)) == 1
    check_invariants(bench.database, [])


@ON_SQLITE
def test_completions_and_several_models(bench: Bench) -> None:
    lines = [
        {"custom_id": str(i), "url": COMPLETIONS, "body": {"model": "tiny", "prompt": "p"}} for i in range(2)
    ]
    batch_id = bench.create(jsonl(lines), endpoint=COMPLETIONS)
    bench.work()
    run(bench.database)
    bench.work()
    line = bench.lines(bench.batch(batch_id).output_file_id)[0]
    assert line["response"]["body"]["object"] == "text_completion"
    assert line["response"]["body"]["choices"][0]["text"] == "out"
    # A worker that was there once makes a model known, also when it is gone.
    mixed = bench.create(jsonl([chat_line(0), chat_line(1, model="unheard-of")]))
    bench.work()
    assert [error["code"] for error in bench.batch(mixed).errors] == ["model_not_found"]


@ON_SQLITE
def test_one_bad_line_and_nothing_runs(bench: Bench) -> None:
    batch_id = bench.create(jsonl([chat_line(0), chat_line(1, temperature=9)]) + b"{")
    bench.work()
    batch = bench.batch(batch_id)
    assert (batch.state, batch.total, batch.clerk) == (BatchState.FAILED, 0, None)
    assert [(error["line"], error["code"]) for error in batch.errors] == [
        (2, "invalid_request"),
        (3, "invalid_json_line"),
    ]
    assert bench.jobs(batch_id) == []
    assert not bench.clerk.work_once()
    check_invariants(bench.database, [])


def test_a_tenant_without_room_gets_the_whole_batch_refused(bench: Bench) -> None:
    Tenants(bench.database).change(DEFAULT, quotas={"queued_jobs": 4})
    fits, too_many = bench.create(4), bench.create(5)
    bench.work()
    assert bench.batch(fits).state == BatchState.IN_PROGRESS
    assert bench.batch(too_many).state == BatchState.FAILED
    (error,) = bench.batch(too_many).errors
    assert (error["code"], error["line"]) == ("quota_exceeded", None)
    assert bench.jobs(too_many) == []
    check(bench)


@pytest.mark.usefixtures("small_chunks")
def test_an_insertion_that_was_cut_off_goes_on_exactly_there(bench: Bench) -> None:
    batch_id = bench.create(
        b"\xef\xbb\xbf"
        + jsonl([chat_line(i) for i in range(4)])
        + b"\n"
        + jsonl([chat_line(i) for i in range(4, 8)])
    )
    insert_one_chunk(bench, batch_id)
    batch = bench.batch(batch_id)
    assert (batch.state, batch.num_inserted, batch.total) == (BatchState.IN_PROGRESS, 3, 8)
    with bench.database.read() as connection:
        assert used(connection, DEFAULT).queued_jobs == 8, "the whole batch has its room"
    check(bench)
    before = bench.jobs(batch_id)
    assert run(bench.database, 3) == 3, "what is there runs already"
    assert bench.batch(batch_id).state == BatchState.IN_PROGRESS, "and does not close the batch"
    check(bench)
    bench.work()
    jobs = bench.jobs(batch_id)
    assert [job.id for job in jobs[:3]] == [job.id for job in before]
    assert [job.custom_id for job in jobs] == [f"line-{i}" for i in range(8)]
    assert [job.id for job in jobs] == [job_id_of(batch_id, i) for i in range(8)]
    run(bench.database)
    bench.work()
    assert [line["custom_id"] for line in bench.lines(bench.batch(batch_id).output_file_id)] == [
        f"line-{i}" for i in range(8)
    ]
    check_invariants(bench.database, [job.id for job in jobs])


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_whose_commit_got_lost_is_not_inserted_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = bench.create(7)
    real = bench.database.transact

    def twice(work: Any, **options: Any) -> Any:
        real(work, **options)
        return real(work, **options)

    monkeypatch.setattr(bench.database, "transact", twice)
    bench.work()
    monkeypatch.undo()
    batch = bench.batch(batch_id)
    assert (batch.num_inserted, batch.next_offset, batch.reserved_tokens) == (7, None, 0)
    assert len(bench.jobs(batch_id)) == 7
    check(bench)
    run(bench.database)
    cancelled = bench.create(2)
    bench.clerk.work_once()
    bench.clerk.work_once()
    Cancels(bench.database).cancel_batch(cancelled, tenant=DEFAULT)
    monkeypatch.setattr(bench.database, "transact", twice)
    bench.work()
    monkeypatch.undo()
    check_invariants(bench.database, [])
    assert bench.batch(batch_id).state == BatchState.COMPLETED
    assert bench.batch(cancelled).state == BatchState.CANCELLED
    assert len(list(bench.settings.files.iterdir())) == 4, "an input and an output of each"


def test_a_lease_is_one_clerks_and_passes_on_when_it_runs_out(bench: Bench) -> None:
    batch_id = bench.create(2)
    first = take(bench.database, 60)
    assert first is not None
    assert take(bench.database, 60) is None
    assert not bench.clerk.work_once()
    bench.change(batch_id, clerk_until=1.0)  # it is taken for dead
    second = take(bench.database, 60)
    assert second is not None
    with pytest.raises(LeaseLost):
        bench.batches.validate(first)
    assert bench.batch(batch_id).state == BatchState.VALIDATING
    first.release()
    assert take(bench.database, 60) is None, "it is not the first one's to release"
    bench.batches.validate(second)
    assert bench.batch(batch_id).state == BatchState.IN_PROGRESS
    second.release()
    bench.work()
    assert len(bench.jobs(batch_id)) == 2


@ON_SQLITE
def test_a_long_check_keeps_its_lease_and_a_stop_ends_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "_LOOK_EVERY", 1)
    batch_id = bench.create(3)
    stopping = threading.Event()
    lease = take(bench.database, 0.0, stopping)
    assert lease is not None
    bench.change(batch_id, clerk_until=2.0)
    lease.tick()
    assert bench.batch(batch_id).clerk_until > 2.0
    stopping.set()
    with pytest.raises(LeaseLost):
        bench.batches.validate(lease)
    assert bench.batch(batch_id).state == BatchState.VALIDATING


def test_tenants_take_turns(bench: Bench) -> None:
    Tenants(bench.database).create("other")
    mine = [bench.create(1) for _ in range(2)]
    content = jsonl([chat_line(0)])
    wish = {"endpoint": CHAT, "completion_window": "24h"}
    owner = Owner("other", None)
    theirs = bench.batches.create(
        parse_wish(wish | {"input_file_id": bench.upload(content, owner=owner)}), owner
    )
    taken = [take(bench.database, 60) for _ in range(4)]
    assert [one.batch_id if one else None for one in taken] == [mine[0], theirs, mine[1], None]


# --- the request ------------------------------------------------------------------------------------------------


def test_a_key_makes_one_batch(bench: Bench) -> None:
    fields = {
        "input_file_id": bench.upload(jsonl([chat_line(0)])),
        "endpoint": CHAT,
        "completion_window": "1h",
    }
    submit = Submit.of("night-1", fields)
    ids = {bench.batches.create(parse_wish(fields), OPERATOR, submit) for _ in range(3)}
    assert len(ids) == 1
    with pytest.raises(KeyReusedError):
        bench.batches.create(parse_wish(fields), OPERATOR, Submit.of("night-1", {}))
    bench.work()
    (batch_id,) = ids
    assert len(bench.jobs(batch_id)) == 1


@ON_SQLITE
def test_a_file_that_cannot_be_an_input(bench: Bench) -> None:
    done = bench.create(1)
    bench.work()
    run(bench.database)
    bench.work()
    fields = {"endpoint": CHAT, "completion_window": "24h"}
    output = parse_wish(fields | {"input_file_id": bench.batch(done).output_file_id})
    with pytest.raises(BadField, match="purpose batch"):
        bench.batches.create(output, OPERATOR)
    for name in ("file-unknown", "../x"):
        with pytest.raises(NoSuchFile):
            bench.batches.create(parse_wish(fields | {"input_file_id": name}), OPERATOR)
    mine = parse_wish(fields | {"input_file_id": bench.batch(done).input_file_id})
    with pytest.raises(NoSuchFile):
        bench.batches.create(mine, Owner("other", None))


WISH = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": "24h"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"endpoint": "/v1/nothing"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"output_expires_after": 7200}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "now", "seconds": 7200}}, "output_expires_after.anchor"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 7}}, "output_expires_after.seconds"),
        ({"priority": 5}, "priority"),
    ],
)
def test_a_wish_that_cannot_be_granted_names_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadField) as caught:
        parse_wish(WISH | change)
    assert caught.value.param == param
    json.dumps(caught.value.as_error())


@ON_SQLITE
def test_the_background_window_has_no_end(bench: Bench) -> None:
    batch_id = bench.create(1, window="background")
    bench.work()
    assert bench.batch(batch_id).expires_at is None
    (job,) = bench.jobs(batch_id)
    assert (job.tier, job.deadline) == (3, None)
    for odd in ([], 7, None):
        with pytest.raises(BadField):
            parse_wish(odd)


@pytest.mark.usefixtures("small_chunks")
def test_another_tenant_stops_nothing(bench: Bench) -> None:
    batch_id = bench.create(8)
    cancels = Cancels(bench.database)
    assert cancels.cancel_batch(batch_id, tenant="other") is None
    assert bench.batch(batch_id).state == BatchState.VALIDATING
    insert_one_chunk(bench, batch_id)
    assert cancels.cancel_batch(batch_id, tenant="other") is None
    assert bench.batch(batch_id).state == BatchState.IN_PROGRESS
    bench.work()
    assert len(bench.jobs(batch_id)) == 8


@pytest.mark.usefixtures("small_chunks")
def test_a_second_cancel_changes_nothing(bench: Bench) -> None:
    batch_id = bench.create(8)
    insert_one_chunk(bench, batch_id)
    cancels = Cancels(bench.database)
    first = cancels.cancel_batch(batch_id, tenant=DEFAULT)
    before = bench.batch(batch_id)
    assert cancels.cancel_batch(batch_id, tenant=DEFAULT) is first
    assert bench.batch(batch_id) == before
    check(bench)


def test_room_that_the_check_took_and_no_job_needs_is_given_back(bench: Bench) -> None:
    """As when a clerk with other settings goes on."""
    batch_id = bench.create(jsonl([chat_line(i, max_tokens=None) for i in range(3)]))
    lease = take(bench.database, 60)
    assert lease is not None
    bench.batches.validate(lease)
    lease.release()
    fewer = bench.settings.model_copy(update={"default_max_tokens": bench.settings.default_max_tokens // 2})
    Bench(bench.database, fewer).work()
    assert len(bench.jobs(batch_id)) == 3
    check(bench)
