"""Claimer: a job whose text cannot be encoded fails alone, whatever the tokenizer raises; a full window lets in who
comes late and is early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from engine.config import EngineConfig
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from jobs.body import JobBody
from jobs.claimer import Claimer
from jobs.claims import Claim, claim
from jobs.database import Database
from jobs.holdings import Holdings
from jobs.intake import Intake
from jobs.outcomes import Outcome
from jobs.settings import Settings
from jobs.supervisor import EngineSupervisor
from jobs.tenants import OPERATOR, Owner, Tenants
from jobs.terms import Terms, Tier


class Roomy(EngineSupervisor):
    """Takes what it is given, and computes none of it."""

    room = 100

    def add(self, requests: Sequence[Request]) -> None:
        pass


def claimer_of(
    database: Database,
    holdings: Holdings,
    supervisor: type[EngineSupervisor],
    encode: Callable[[Sequence[Claim]], list[Request | BaseException]],
    outcomes: list[Outcome],
) -> Claimer:
    """A window of 8, of which the engine runs 4 at once."""
    return Claimer(
        database,
        holdings,
        supervisor(
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


def test_every_unencodable_job_of_a_group_fails_with_its_own_reason(database: Database, submit) -> None:
    ids = submit(3)
    raised = dict(
        zip(ids, (RuntimeError("secret prompt"), ValueError("too odd"), SystemError("panic")), strict=True)
    )

    def encode(items: Sequence[Claim]) -> list[Request | BaseException]:
        return [raised[item.job_id] for item in items]

    outcomes: list[Outcome] = []
    holdings = Holdings()
    claimer = claimer_of(database, holdings, EngineSupervisor, encode, outcomes)
    claimer._admit(holdings.add(database.transact(partial(claim, worker_id="w", model="tiny", limit=3))))
    assert {outcome.job_id: outcome.error["code"] for outcome in outcomes if outcome.error} == {
        ids[0]: "encode_failed",
        ids[1]: "invalid_request",
        ids[2]: "encode_failed",
    }
    assert not any("secret" in str(outcome.error) for outcome in outcomes)


def encoded(items: Sequence[Claim]) -> list[Request | BaseException]:
    return [
        Request(
            id=RequestId(item.job_id, item.fence),
            prompt_token_ids=(1, 2, 3),
            sampling=SamplingParams(seed=item.seed),
        )
        for item in items
    ]


def test_a_newcomer_that_comes_during_a_claim_is_not_forgotten(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tenants(database).create("other")
    intake, holdings = Intake(database, settings), Holdings()
    claimer = claimer_of(database, holdings, Roomy, encoded, [])
    bodies = [JobBody(prompt="x", max_tokens=8) for _ in range(50)]
    intake.accept_many(bodies[:7], OPERATOR)

    class Busy:
        """While the first claim runs, others hand in."""

        def transact(self, write: Callable[..., list[Claim]]) -> list[Claim]:
            claims = database.transact(write)
            if not len(holdings):
                intake.accept_many(bodies, OPERATOR)
                intake.accept_many(bodies[:3], Owner("other", None))
                claimer.wake()
            return claims

    monkeypatch.setattr(claimer, "database", Busy())
    claimer.wake()
    claimer._fill()
    assert Counter(one.claim.tenant for one in holdings.all()) == {OPERATOR.tenant: 7, "other": 3}


def test_newcomers_come_in_beyond_a_full_window(database: Database, settings: Settings) -> None:
    Tenants(database).create("other")
    intake, holdings = Intake(database, settings), Holdings()
    claimer = claimer_of(database, holdings, Roomy, encoded, [])

    def held() -> Counter[str]:
        claimer.wake()
        claimer._fill()
        return Counter(holding.claim.tenant for holding in holdings.all())

    bodies = [JobBody(prompt="x", max_tokens=8) for _ in range(50)]
    intake.accept_many(bodies, OPERATOR)
    assert held() == {OPERATOR.tenant: 8}
    intake.accept_many(bodies, OPERATOR)
    assert held() == {OPERATOR.tenant: 8}, "more of the same wait in SQL"
    holdings.remove([next(iter(holdings.all())).id])
    intake.accept_many(bodies[:3], Owner("other", None))
    assert held() == {OPERATOR.tenant: 7, "other": 3}, "one takes the place that was left, two overtake"
    intake.accept_many(bodies, Owner("other", None))
    assert held() == {OPERATOR.tenant: 7, "other": 5}, "not more than the engine runs at once"


def test_the_last_places_are_left_to_those_whom_somebody_waits_for(
    database: Database, settings: Settings
) -> None:
    intake, holdings = Intake(database, settings), Holdings()

    class Scarce(Roomy):
        @property
        def room(self) -> int:  # type: ignore[override]
            return 3 - len(holdings)

    claimer = claimer_of(database, holdings, Scarce, encoded, [])
    body = JobBody(prompt="x", max_tokens=8)
    intake.accept_many([body] * 9, OPERATOR)
    claimer.wake()
    claimer._fill()
    assert [one.claim.tier for one in holdings.all()] == [Tier.NORMAL] * 2
    intake.accept_one(body, OPERATOR, terms=Terms(tier=Tier.INTERACTIVE))
    claimer.wake()
    claimer._fill()
    assert [one.claim.tier for one in holdings.all()] == [Tier.NORMAL] * 2 + [Tier.INTERACTIVE]
