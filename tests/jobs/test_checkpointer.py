"""Checkpointer: what is put is saved in order, and nothing is lost while the database is away."""

from __future__ import annotations

from functools import partial

from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from engine.growth import Growth
from engine.request import Generated, RequestId
from jobs.checkpointer import Checkpointer
from jobs.checkpoints import load
from jobs.claims import claim
from jobs.database import Database
from jobs.holdings import Holdings


def part(job_id: str, start: int, *tokens: int) -> Growth:
    return Growth(id=RequestId(job_id, 1), starts=(start,), generated=(Generated(token_ids=tokens),))


def test_parts_that_wait_are_put_together(database: Database, submit, monkeypatch) -> None:
    first, second = submit(2)
    holdings = Holdings()
    claims = database.transact(partial(claim, worker_id="w", model="tiny", limit=2))
    held = {item.claim.job_id: item for item in holdings.add(claims)}
    monkeypatch.setattr("jobs.checkpointer.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("jobs.checkpointer.PATIENCE_SECONDS", 0.0)
    away = 3  # transactions that the database refuses

    @event.listens_for(database.engine, "begin")
    def refuse(connection: object) -> None:
        nonlocal away
        if away:
            away -= 1
            if away == 1:
                checkpointer.put([part(first, 3, 4)])  # while the first parts are on their way
            raise OperationalError("BEGIN", {}, Exception("away"))

    checkpointer = Checkpointer(database, holdings, lambda: "w", "weights")
    checkpointer.put([part(first, 0, 1, 2), part(second, 0, 7)])
    checkpointer.put([part(first, 2, 3)])
    checkpointer.start()
    assert checkpointer.flush(30)
    assert away == 0
    checkpointer.put([part(first, 4, 5), part("unknown", 0, 1)])
    assert checkpointer.flush(30)
    checkpointer.stop()
    assert not checkpointer.is_alive()
    with database.read() as connection:
        made = load(connection, [first, second], "weights")
    assert made == {
        first: (Generated(token_ids=(1, 2, 3, 4, 5)),),
        second: (Generated(token_ids=(7,)),),
    }
    assert held[first].num_saved == 5
    assert held[first].progressed
    assert held[second].num_saved == 1


def test_behind_a_gap_nothing_is_taken(database: Database, submit) -> None:
    (job_id,) = submit(1)
    holdings = Holdings()
    holdings.add(database.transact(partial(claim, worker_id="w", model="tiny", limit=1)))
    checkpointer = Checkpointer(database, holdings, lambda: "w", "weights")
    checkpointer.put([part(job_id, 0, 1)])
    checkpointer.put([part(job_id, 5, 6)])
    checkpointer.start()
    assert checkpointer.flush(30)
    checkpointer.stop()
    with database.read() as connection:
        assert load(connection, [job_id], "weights") == {job_id: (Generated(token_ids=(1,)),)}
