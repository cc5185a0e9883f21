"""LeaseKeeper: what memory and SQL disagree on is put right, but not at the first look."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from sqlalchemy import update

from jobs import lease_keeper
from jobs.cancels import Cancels
from jobs.claims import claim
from jobs.database import Database
from jobs.holdings import Holding, Holdings
from jobs.lease_keeper import LeaseKeeper
from jobs.leases import register
from jobs.models import Job, Worker
from jobs.outcomes import Outcome
from jobs.states import JobState, WorkerState
from tests.jobs.conftest import Submit


@dataclass
class Desk:
    """A worker's memory, and what its keeper had done."""

    database: Database
    holdings: Holdings = field(default_factory=Holdings)
    ended: list[Holding] = field(default_factory=list)
    finished: list[Outcome] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.database.transact(partial(register, worker_id="w", model="tiny", lease_seconds=60.0))
        self.keeper = LeaseKeeper(
            self.database,
            self.holdings,
            worker_id=lambda: "w",
            lease_seconds=60.0,
            renew_seconds=20.0,
            report=dict[str, Any],
            end=self.ended.append,
            finish=self.finished.append,
            on_lost=lambda: self.calls.append("lost"),
            on_renewed=lambda: self.calls.append("renewed"),
        )

    def take(self, *, remember: bool = True) -> list[Holding]:
        """Claim all there is; without `remember` as when the answer to the claim got lost."""
        claims = self.database.transact(partial(claim, worker_id="w", model="tiny", limit=9))
        return self.holdings.add(claims) if remember else []

    def look(self) -> tuple[list[Holding], list[Outcome]]:
        """Renew once; what is ended and what is handed back by that."""
        self.ended.clear()
        self.finished.clear()
        self.keeper._renew()
        return list(self.ended), list(self.finished)


@pytest.fixture
def desk(database: Database, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(lease_keeper, "SETTLE_SECONDS", 0.0)
    return Desk(database)


def test_what_both_know_is_left_alone(desk: Desk, submit: Submit) -> None:
    submit(3)
    desk.take()
    for _ in range(3):
        assert desk.look() == ([], [])
    assert desk.calls == ["renewed"] * 3


def test_what_is_to_be_cancelled_is_ended_at_once(desk: Desk, submit: Submit) -> None:
    submit(2)
    _, second = desk.take()
    assert Cancels(desk.database).cancel_job(second.claim.job_id, tenant="default") is JobState.CANCELLING
    assert desk.look() == ([second], [])


def test_what_only_sql_knows_is_handed_back_at_the_second_look(desk: Desk, submit: Submit) -> None:
    """At the first one its claim may be on its way."""
    (job_id,) = submit(1)
    desk.take(remember=False)
    assert desk.look() == ([], [])
    assert desk.look() == ([], [Outcome(job_id=job_id, fence=1, kind="released")])


def test_looks_that_follow_at_once_prove_nothing(
    desk: Desk, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when many jobs are cancelled, each with a poke, while a claim is on its way into memory."""
    monkeypatch.setattr(lease_keeper, "SETTLE_SECONDS", 600.0)
    submit(2)
    desk.take(remember=False)
    assert [desk.look() for _ in range(5)] == [([], [])] * 5
    monkeypatch.setattr(lease_keeper, "SETTLE_SECONDS", 0.0)
    assert len(desk.look()[1]) == 2


def test_what_only_memory_knows_is_ended_at_the_second_look(desk: Desk, submit: Submit) -> None:
    """At the first one its outcome may have been written just now."""
    submit(2)
    holding, other = desk.take()
    take_away(desk, holding)
    assert desk.look() == ([], [])
    assert desk.look() == ([holding], [])
    desk.holdings.remove([holding.id])
    take_away(desk, other)
    assert desk.look() == ([], []), "each has a first look of its own"


def test_a_lease_that_is_gone_is_told_and_nothing_else_is_done(desk: Desk, submit: Submit) -> None:
    submit(2)
    desk.take()
    desk.database.transact(lambda c: c.execute(update(Worker).values(state=WorkerState.LOST)))
    assert desk.look() == ([], [])
    assert desk.calls == ["lost"]


def take_away(desk: Desk, holding: Holding) -> None:
    """As a sweep does."""
    change = update(Job).where(Job.id == holding.claim.job_id)
    desk.database.transact(lambda c: c.execute(change.values(state=JobState.QUEUED, worker_id=None)))
