"""Writer: groups, and an outcome that the database refuses harms only itself."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy import event

from engine.request import RequestId
from jobs import writer as writer_module
from jobs.audience import Audience
from jobs.body import parse_job
from jobs.claims import claim
from jobs.database import Database
from jobs.holdings import Holdings
from jobs.intake import Intake
from jobs.outcomes import Outcome, Recorded
from jobs.settings import Settings
from jobs.states import JobState
from jobs.tenants import OPERATOR
from jobs.writer import Writer
from tests.support import rows
from tests.support.waiting import wait_until


def test_outcomes_are_committed_in_groups_and_let_go(database: Database, submit) -> None:
    ids = submit(300)
    holdings = Holdings()
    claims = database.transact(partial(claim, worker_id="w", model="tiny", limit=300))
    holdings.add(claims)
    commits: list[int] = []
    recorded: list[Recorded] = []
    event.listen(database.engine, "commit", lambda connection: commits.append(1))
    writer = Writer(database, holdings, lambda: "w", recorded.extend)
    for item in claims:
        writer.put(Outcome(job_id=item.job_id, fence=1, kind="completed", outputs=[{"text": "ok"}]))
    writer.start()
    writer.stop(30.0)
    assert rows.jobs_by_state(database) == {"completed": ids}
    assert len(recorded) == 300
    assert len(commits) <= 3
    assert len(holdings) == 0


def test_a_refused_outcome_fails_its_own_job_only(database: Database, submit) -> None:
    first, second = submit(2)
    holdings = Holdings()
    holdings.add(database.transact(partial(claim, worker_id="w", model="tiny", limit=2)))
    writer = Writer(database, holdings, lambda: "w", lambda recorded: None)
    # NULL in a NOT NULL column stands for anything that a database will not take.
    writer.put(
        Outcome(job_id=first, fence=1, kind="completed", outputs=[{"text": "a"}], prompt_tokens=None)  # type: ignore[arg-type]
    )
    writer.put(Outcome(job_id=second, fence=1, kind="completed", outputs=[{"text": "b"}]))
    writer.start()
    writer.stop(30.0)
    assert rows.job(database, first).state == JobState.FAILED
    assert rows.job(database, first).error["code"] == "unstorable_output"
    assert rows.job(database, second).state == JobState.COMPLETED


def test_an_outcome_that_cannot_even_be_written_out_fails_its_own_job_only(
    database: Database, submit
) -> None:
    first, second = submit(2)
    holdings = Holdings()
    holdings.add(database.transact(partial(claim, worker_id="w", model="tiny", limit=2)))
    writer = Writer(database, holdings, lambda: "w", lambda recorded: None)
    for job_id, text in ((first, b"no text"), (second, "b")):
        writer.put(Outcome(job_id=job_id, fence=1, kind="completed", outputs=[{"text": text}]))
    writer.start()
    writer.stop(30.0)
    assert rows.job(database, first).error["code"] == "unstorable_output"
    assert rows.job(database, second).state == JobState.COMPLETED


def test_stale_outcomes_are_counted_and_dropped(database: Database, submit) -> None:
    (job_id,) = submit(1)
    holdings = Holdings()
    holdings.add(database.transact(partial(claim, worker_id="w", model="tiny", limit=1)))
    recorded: list[Recorded] = []
    writer = Writer(database, holdings, lambda: "somebody else", recorded.extend)
    writer.put(Outcome(job_id=job_id, fence=1, kind="completed", outputs=[{"text": "a"}]))
    writer.start()
    writer.stop(30.0)
    assert [item.state for item in recorded] == [None]
    assert rows.results(database) == {}
    assert holdings.get(RequestId(job_id, 1)) is None


def test_what_somebody_waits_for_does_not_wait_for_company(
    database: Database, settings: Settings, submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "GATHER_SECONDS", 300.0)
    (patient,) = submit(1)
    body = parse_job({"prompt": "now"}, settings)
    awaited = Intake(database, settings).accept_one(body, OPERATOR, audience=Audience.END)
    holdings = Holdings()
    holdings.add(database.transact(partial(claim, worker_id="w", model="tiny", limit=2)))
    recorded: list[Recorded] = []
    writer = Writer(database, holdings, lambda: "w", recorded.extend)
    writer.start()
    for job_id in (patient, awaited):
        writer.put(Outcome(job_id=job_id, fence=1, kind="completed", outputs=[{"text": "a"}]))
    wait_until(lambda: len(recorded) == 2, "both are committed", 30)
    assert {item.outcome.job_id: item.audience for item in recorded} == {patient: 0, awaited: 1}
    writer.stop(30.0)
