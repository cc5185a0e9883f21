"""Files: nothing is visible before it is safe, its bytes are counted, and whatever ends leaves nothing."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert, select, update

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.dialects import now
from jobs.file_batches import NoSuchFile, parse_wish
from jobs.file_store import FileStore, new_file_id
from jobs.files import PLACE_SECONDS, FileInUse, check_life, check_purpose
from jobs.models import Batch, File
from jobs.quotas import QuotaExceeded
from jobs.settings import Settings
from jobs.states import BatchState
from jobs.tallies import used
from jobs.tenants import DEFAULT, OPERATOR, Owner, Tenants
from tests.support.batch_lines import CHAT, Bench, run
from tests.support.databases import ON_SQLITE
from tests.support.invariants import check_tallies


@pytest.fixture
def bench(database: Database, settings: Settings) -> Bench:
    return Bench(database, settings)


def on_disk(bench: Bench) -> set[str]:
    folder = bench.settings.files
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def stored(bench: Bench, tenant: str = DEFAULT) -> int:
    with bench.database.read() as connection:
        check_tallies(connection)
        return used(connection, tenant).stored_bytes


def age(path: Path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def test_a_file_is_there_when_its_row_is(bench: Bench) -> None:
    part = bench.files.store.begin()
    part.write(b"hello ")
    part.write(b"you")
    assert bench.files.find(part.file_id, tenant=DEFAULT) is None
    assert on_disk(bench) == {f"{part.file_id}.part"}
    made = bench.files.keep(part, owner=OPERATOR, filename="../../etc/passwd", seconds=None)
    assert on_disk(bench) == {made.id}
    assert (made.bytes, made.filename, made.expires_at) == (9, "../../etc/passwd", None)
    assert bench.files.find(made.id, tenant=DEFAULT) == made
    with bench.files.store.open(made.id) as file:
        assert file.read() == b"hello you"
    assert stored(bench) == 9
    assert (bench.settings.files / made.id).stat().st_mode & 0o077 == 0


@ON_SQLITE
def test_another_tenant_sees_nothing(bench: Bench) -> None:
    Tenants(bench.database).create("other")
    file_id = bench.upload(b"x")
    assert bench.files.find(file_id, tenant="other") is None
    assert not bench.files.delete(file_id, tenant="other")
    page = {"purpose": None, "limit": 10, "direction": "asc"}
    assert bench.files.page(tenant="other", after=None, **page) == ([], False)  # type: ignore[arg-type]
    with pytest.raises(BadField, match="after"):
        bench.files.page(tenant="other", after=file_id, **page)  # type: ignore[arg-type]
    assert bench.files.find(file_id, tenant=DEFAULT) is not None


def test_pages(bench: Bench) -> None:
    ids = [bench.upload(b"x") for _ in range(5)]
    with bench.database.write() as connection:  # at one moment: the id decides
        connection.execute(update(File).values(created_at=5.0))
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        seen: list[str] = []
        more = True
        while more:
            page, more = bench.files.page(
                tenant=DEFAULT, purpose="batch", after=seen[-1] if seen else None, limit=2, direction=order
            )  # type: ignore[arg-type]
            seen += [file.id for file in page]
        assert seen == expected
    assert bench.files.page(tenant=DEFAULT, purpose="batch_output", after=None, limit=9, direction="asc") == (
        [],
        False,
    )


def test_a_full_tenant_gets_no_file(bench: Bench) -> None:
    Tenants(bench.database).change(
        DEFAULT, quotas={"stored_bytes": 10, "queued_jobs": 0, "tokens_per_day": 0}
    )
    file_id = bench.upload(b"12345678")
    with pytest.raises(QuotaExceeded, match="stored_bytes"):
        bench.files.check_room(DEFAULT, 3)
    bench.files.check_room(DEFAULT, 2)
    part = bench.files.store.begin()
    part.write(b"123")
    with pytest.raises(QuotaExceeded, match="at most 10 stored bytes are allowed, 8 are used"):
        bench.files.keep(part, owner=OPERATOR, filename="b", seconds=None)
    part.drop()
    part.drop()
    assert on_disk(bench) == {file_id}
    assert stored(bench) == 8
    assert bench.files.delete(file_id, tenant=DEFAULT)
    assert stored(bench) == 0
    bench.upload(b"1234567890")


def test_a_file_that_is_needed_stays(bench: Bench) -> None:
    batch_id = bench.create(1)
    file_id = bench.batch(batch_id).input_file_id
    with pytest.raises(FileInUse, match=batch_id):
        bench.files.delete(file_id, tenant=DEFAULT)
    with bench.database.write() as connection:
        connection.execute(update(File).values(expires_at=now() - 1))
    assert bench.files.end_expired() == 0
    assert bench.files.find(file_id, tenant=DEFAULT) is None, "it has expired all the same"
    bench.work()
    assert len(bench.jobs(batch_id)) == 1
    bench.change(batch_id, finished_at=1.0)
    assert bench.files.end_expired() == 1
    assert file_id not in on_disk(bench)


def test_expired_files_are_gone_and_give_their_room_back(bench: Bench) -> None:
    Tenants(bench.database).create("other")
    stays = bench.upload(b"123", seconds=3600)
    goes = [
        bench.upload(b"12345", seconds=3600),
        bench.upload(b"1", owner=Owner("other", None), seconds=3600),
    ]
    assert bench.files.end_expired() == 0
    with bench.database.write() as connection:
        connection.execute(update(File).where(File.id.in_(goes)).values(expires_at=now()))
    assert bench.files.find(goes[0], tenant=DEFAULT) is None
    assert not bench.files.delete(goes[0], tenant=DEFAULT)
    assert bench.files.page(tenant=DEFAULT, purpose=None, after=goes[0], limit=5, direction="desc")[0]
    assert bench.files.end_expired() == 2
    assert on_disk(bench) == {stays}
    assert (stored(bench), stored(bench, "other")) == (3, 0)
    view = bench.files.find(stays, tenant=DEFAULT)
    assert view is not None
    assert view.expires_at == pytest.approx(view.created_at + 3600)
    assert bench.files.end_expired() == 0


def test_files_that_have_not_expired_are_not_looked_at(bench: Bench) -> None:
    asked: list[tuple[str, Any]] = []
    row = {"tenant": DEFAULT, "purpose": "batch", "filename": "f", "bytes": 1, "created_at": 0.0}
    ends = (time.time() + 3600 + seconds for seconds in range(5_000))
    with bench.database.write() as connection:
        rows = [row | {"id": f"file-{end}", "expires_at": end} for end in ends]
        connection.execute(insert(File), rows)
        connection.exec_driver_sql("ANALYZE")

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        asked.append((statement, parameters))

    event.listen(bench.database.engine, "before_cursor_execute", note)
    assert bench.files.end_expired() == 0
    event.remove(bench.database.engine, "before_cursor_execute", note)
    how = "EXPLAIN QUERY PLAN" if bench.database.is_sqlite else "EXPLAIN"
    questions = [one for one in asked if "FROM files" in one[0]]
    assert len(questions) == 2
    with bench.database.read() as connection:
        for statement, parameters in questions:
            plan = str(connection.exec_driver_sql(f"{how} {statement}", parameters).all())
            assert "ix_files_expires_at" in plan, plan


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_who_deletes_what_is_listed_can_go_on_behind_it(bench: Bench, order: Any) -> None:
    """For an hour; then the place of what is gone is gone as well."""
    ids = {bench.upload(b"x") for _ in range(5)}
    seen: list[str] = []
    more = True
    while more:
        after = seen[-1] if seen else None
        page, more = bench.files.page(tenant=DEFAULT, purpose=None, after=after, limit=2, direction=order)
        for file in page:
            assert bench.files.delete(file.id, tenant=DEFAULT)
            assert not bench.files.delete(file.id, tenant=DEFAULT)
            seen.append(file.id)
    assert sorted(seen) == sorted(ids)
    assert (stored(bench), on_disk(bench)) == (0, set())
    assert bench.files.end_expired() == 0
    with bench.database.write() as connection:
        assert not any(connection.scalars(select(File.filename)))
        connection.execute(update(File).values(expires_at=now() - PLACE_SECONDS))
    bench.files.end_expired()
    with bench.database.read() as connection:
        assert connection.scalars(select(File.id)).all() == []
    with pytest.raises(BadField):
        bench.files.page(tenant=DEFAULT, purpose=None, after=seen[-1], limit=2, direction=order)


@ON_SQLITE
def test_what_a_death_left_is_cleaned_and_nothing_else(bench: Bench) -> None:
    store = bench.files.store
    assert bench.files.clean() == 0  # before there is a folder
    kept, fresh, torn, orphan = bench.upload(b"x"), store.begin(), store.begin(), store.begin()
    torn.write(b"half")
    orphan.write(b"whole, and the commit never came")
    orphan.keep()
    folder = bench.settings.files
    stranger = folder / "notes.txt"
    stranger.write_text("mine")
    for path in (folder / kept, folder / f"{torn.file_id}.part", folder / orphan.file_id, stranger):
        age(path, 4_000)
    assert bench.files.clean() == 2
    assert on_disk(bench) == {kept, f"{fresh.file_id}.part", "notes.txt"}
    assert bench.files.clean() == 0
    for part in (fresh, torn):
        part.drop()


@ON_SQLITE
@pytest.mark.parametrize("hours", [2, -2])
def test_an_api_whose_clock_is_wrong_leaves_what_another_uploads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    running, torn = bench.files.store.begin(), bench.files.store.begin()
    running.write(b"half of an upload")
    age(bench.settings.files / f"{torn.file_id}.part", 4_000)
    monkeypatch.setattr(time, "time", lambda at=time.time: at() + 3_600 * hours)
    assert bench.files.clean() == 1
    assert on_disk(bench) == {f"{running.file_id}.part"}
    for part in (running, torn):
        part.drop()


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "file-", "file-" + "0" * 31, "file-" + "0" * 32 + ".part"]
)
def test_only_names_of_ours_are_looked_for(tmp_path: Path, name: str) -> None:
    store = FileStore(tmp_path)
    (tmp_path / ("file-" + "0" * 32 + ".part")).write_text("half")
    with pytest.raises(FileNotFoundError):
        store.open(name)
    assert new_file_id() != new_file_id()


def test_purposes_and_lives() -> None:
    assert check_purpose("batch") == "batch"
    for purpose in ("fine-tune", "assistants", "vision", "user_data", "evals", "batch_output", "x", "", None):
        with pytest.raises(BadField, match="purpose"):
            check_purpose(purpose)
    with pytest.raises(BadField, match="fine-tune is not offered here"):
        check_purpose("fine-tune")
    assert check_life("created_at", 3600) == 3600
    for anchor, seconds in (("created_at", 3599), ("created_at", 2_592_001), ("now", 3600), (None, 3600)):
        with pytest.raises(BadField, match="expires_after"):
            check_life(anchor, seconds)
    for odd in (True, 3600.0, "3600", None):
        with pytest.raises(BadField, match=r"expires_after\.seconds"):
            check_life("created_at", odd)


def test_a_file_whose_batch_has_ended_may_go(bench: Bench) -> None:
    batch_id = bench.create(2)
    bench.work()
    run(bench.database)
    bench.work()
    assert bench.batch(batch_id).state == BatchState.COMPLETED
    assert bench.files.delete(bench.batch(batch_id).input_file_id, tenant=DEFAULT)


def test_a_delete_and_a_new_batch_are_put_in_an_order(bench: Bench) -> None:
    """Either the batch has the file, or there is neither."""
    for _ in range(15):
        file_id = bench.upload(b"{}\n")
        gate = threading.Barrier(2)

        def delete(file_id: str = file_id, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            try:
                return bench.files.delete(file_id, tenant=DEFAULT)
            except FileInUse:
                return False

        def create(file_id: str = file_id, gate: threading.Barrier = gate) -> bool:
            wish = parse_wish({"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"})
            gate.wait()
            try:
                bench.batches.create(wish, OPERATOR)
            except NoSuchFile:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            deleted, made = pool.submit(delete), pool.submit(create)
        assert deleted.result() is not made.result()
        assert (bench.files.find(file_id, tenant=DEFAULT) is not None) is made.result()
    with bench.database.read() as connection:
        needed = set(connection.scalars(select(Batch.input_file_id)))
    assert needed == on_disk(bench), "each batch has its file, and no other is left"
