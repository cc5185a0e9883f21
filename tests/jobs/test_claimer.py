"""Claimer: a job whose text cannot be encoded fails alone, whatever the tokenizer raises."""

from __future__ import annotations

from functools import partial

from engine.config import EngineConfig
from engine.request import Request
from jobs.claimer import Claimer
from jobs.claims import Claim, claim
from jobs.database import Database
from jobs.holdings import Holdings
from jobs.outcomes import Outcome
from jobs.supervisor import EngineSupervisor


def test_every_unencodable_job_of_a_group_fails_with_its_own_reason(database: Database, submit) -> None:
    ids = submit(3)
    raised = dict(
        zip(ids, (RuntimeError("secret prompt"), ValueError("too odd"), SystemError("panic")), strict=True)
    )

    def encode(item: Claim) -> Request:
        raise raised[item.job_id]

    outcomes: list[Outcome] = []
    holdings = Holdings()
    claimer = Claimer(
        database,
        holdings,
        EngineSupervisor(
            EngineConfig(model="tiny"),
            on_ready=lambda hello: None,
            on_completions=lambda completions: None,
            on_progress=lambda progress: None,
            on_grown=lambda growths: None,
            on_streamed=lambda growths: None,
            on_death=lambda returncode, ids, stalled: None,
            on_hopeless=lambda reason: None,
        ),
        model="tiny",
        worker_id=lambda: "w",
        encode=encode,
        finish=outcomes.append,
        on_more=lambda: None,
        window=8,
        places=4,
        reserve=1,
    )
    claimer._admit(holdings.add(database.transact(partial(claim, worker_id="w", model="tiny", limit=3))))
    assert {outcome.job_id: outcome.error["code"] for outcome in outcomes if outcome.error} == {
        ids[0]: "encode_failed",
        ids[1]: "invalid_request",
        ids[2]: "encode_failed",
    }
    assert not any("secret" in str(outcome.error) for outcome in outcomes)
