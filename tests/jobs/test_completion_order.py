"""Pages of results: the order of completion loses and repeats nothing, whoever commits when."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, select, text, update

from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.completion_order import CompletionOrder, Order
from jobs.database import Database
from jobs.dialects import now
from jobs.intake import Intake
from jobs.leases import register
from jobs.models import Batch, Job
from jobs.outcomes import Outcome, record
from jobs.reads import Reads
from jobs.settings import Settings
from jobs.tenants import OPERATOR
from tests.support.invariants import check_places

OUTPUTS = [{"index": 0, "text": "out", "finish_reason": "stop", "stop_reason": None}]


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)
    return Intake(database, settings)


@pytest.fixture
def order(database: Database) -> CompletionOrder:
    return CompletionOrder(database)


def held(database: Database, intake: Intake, count: int) -> tuple[str, list[str]]:
    """A batch, and its jobs in input order, all claimed."""
    batch_id = intake.accept_many([JobBody(prompt="x")] * count, OPERATOR)
    with database.write() as connection:
        claims = claim(connection, worker_id="w", model="tiny", limit=count)
    return batch_id, sorted(one.job_id for one in claims)


def end(connection: Connection, *job_ids: str) -> None:
    outcomes = [Outcome(job_id=job_id, fence=1, kind="completed", outputs=OUTPUTS) for job_id in job_ids]
    record(connection, worker_id="w", outcomes=outcomes)


def read(
    database: Database, batch_id: str, after: int | None, limit: int = 1000, by: Order = Order.COMPLETION
) -> tuple[list[str], int, bool]:
    """Ids of the next page, its cursor, and whether more will follow, now or later."""
    page = CompletionOrder(database).page(batch_id, tenant="default", order=by, after=after, limit=limit)
    assert page is not None
    views = Reads(database).results(batch_id, tenant="default", order=by, after=page.after, last=page.last)
    return [view.id for view in views], page.last, page.has_more or not page.closed


def test_as_they_end(database: Database, intake: Intake) -> None:
    batch_id, ids = held(database, intake, 5)
    assert read(database, batch_id, None) == ([], 0, True)
    for job_id in (ids[3], ids[0]):
        with database.write() as connection:
            end(connection, job_id)
    assert read(database, batch_id, None) == ([ids[3], ids[0]], 2, True)
    assert read(database, batch_id, 2) == ([], 2, True)
    Cancels(database).cancel_batch(batch_id, tenant="default")
    with database.write() as connection:
        end(connection, *ids)
    rest = [ids[1], ids[2], ids[4]]
    assert read(database, batch_id, 2) == (rest, 5, False)
    assert read(database, batch_id, 2, limit=2) == (rest[:2], 4, True)
    assert read(database, batch_id, 4, limit=1) == (rest[2:], 5, False)
    assert read(database, batch_id, 5) == ([], 5, False)
    assert read(database, batch_id, 0, limit=3) == ([ids[3], ids[0], ids[1]], 3, True)
    assert read(database, batch_id, -1, limit=5) == ([ids[3], ids[0], *rest], 5, False)
    check_places(database)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
def test_pages_of_any_size(database: Database, intake: Intake, limit: int) -> None:
    batch_id, ids = held(database, intake, 7)
    with database.write() as connection:
        end(connection, *ids)
    for by in Order:
        seen: list[str] = []
        after: int | None = None
        more = True
        while more:
            page, after, more = read(database, batch_id, after, limit, by)
            assert len(page) <= limit
            assert page
            if by is Order.COMPLETION:
                with database.read() as connection:
                    placed = connection.scalars(select(Batch.num_placed)).one()
                assert placed == min(after + 1, 7), "no more than the page needs to know whether more follow"
            seen += page
        assert sorted(seen) == ids
        assert len(seen) == 7
    check_places(database)


def test_a_job_that_ended_earlier_and_was_committed_later(database: Database, intake: Intake) -> None:
    """Its time lies before the cursor, its place does not."""
    batch_id, (first, second, third) = held(database, intake, 3)

    def end_long_ago(connection: Connection) -> None:
        end(connection, first)
        connection.execute(update(Job).where(Job.id == first).values(finished_at=now() - 100))

    if database.is_sqlite:  # there is one writer, so the other transaction cannot be open meanwhile
        with database.write() as connection:
            end(connection, second)
        assert read(database, batch_id, None) == ([second], 1, True)
        database.transact(end_long_ago)
    else:
        # It holds its job, but not yet the batch.
        with database.engine.begin() as slow:
            slow.execute(select(Job.id).where(Job.id == first).with_for_update())
            with database.write() as connection:
                end(connection, second)
            assert read(database, batch_id, None) == ([second], 1, True)
            end_long_ago(slow)
            # Now it has the batch too: whoever wants to see what has ended since waits for it.
            with ThreadPoolExecutor(1) as pool:
                later = pool.submit(read, database, batch_id, 1)
                slow.execute(text("SELECT 1"))
                slow.commit()
                assert later.result(30)[0] in ([first], [])
    assert read(database, batch_id, 1) == ([first], 2, True)
    with database.write() as connection:
        end(connection, third)
    assert read(database, batch_id, 2) == ([third], 3, False)
    check_places(database)


def test_readers_and_writers_at_once(database: Database, intake: Intake) -> None:
    """Three threads end jobs in random groups, two follow: both see each job once, and agree about the order."""
    batch_id, ids = held(database, intake, 90)
    shuffled = random.Random(4).sample(ids, len(ids))
    start = threading.Barrier(5)

    def write(mine: list[str]) -> None:
        start.wait(30)
        while mine:
            some, mine = sorted(mine[:4]), mine[4:]
            database.transact(lambda connection, some=some: end(connection, *some))

    def follow(limit: int) -> list[str]:
        start.wait(30)
        seen: list[str] = []
        after: int | None = None
        more = True
        while more:
            page, after, more = read(database, batch_id, after, limit)
            seen += page
        return seen

    with ThreadPoolExecutor(5) as pool:
        writers = [pool.submit(write, shuffled[i::3]) for i in range(3)]
        readers = [pool.submit(follow, limit) for limit in (3, 50)]
        for writer in writers:
            writer.result(60)
        one, other = (reader.result(60) for reader in readers)
    assert len(one) == len(ids)
    assert sorted(one) == ids
    assert one == other
    check_places(database)


def test_what_is_not_there(database: Database, intake: Intake, order: CompletionOrder) -> None:
    batch_id, ids = held(database, intake, 2)
    with database.write() as connection:
        end(connection, *ids)
    for by in Order:
        assert order.page(batch_id, tenant="other", order=by, after=None, limit=5) is None
        assert order.page("batch_x", tenant="default", order=by, after=None, limit=5) is None
    with pytest.raises(BadField, match="after"):
        order.page(batch_id, tenant="default", order=Order.COMPLETION, after=1, limit=5)
    with database.read() as connection:
        assert connection.scalars(select(Batch.num_placed)).one() == 0, "nothing was written for it"


def test_places_are_found_by_index(database: Database, intake: Intake) -> None:
    if not database.is_sqlite:
        pytest.skip("PostgreSQL plans by statistics, which a small table has none of")
    batch_id, _ = held(database, intake, 2)
    with database.read() as connection:
        for condition, index in (
            ("place IS NULL AND finished_at IS NOT NULL ORDER BY finished_at, id", "ix_jobs_unplaced"),
            ("place > 3 ORDER BY place", "ix_jobs_placed"),
        ):
            query = f"EXPLAIN QUERY PLAN SELECT id FROM jobs WHERE batch_id = '{batch_id}' AND {condition}"
            plan = str(connection.exec_driver_sql(query).all())
            assert index in plan, plan
            assert "TEMP B-TREE" not in plan, plan
