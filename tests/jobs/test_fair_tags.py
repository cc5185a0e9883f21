"""The order of work: nobody waits behind another's long queue, whatever the order in which they came."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from jobs.body import JobBody
from jobs.claims import Claim, claim
from jobs.database import Database
from jobs.fair_tags import BUCKET_TOKENS
from jobs.intake import Intake
from jobs.settings import Settings
from jobs.tenants import OPERATOR, Owner, Tenants
from jobs.terms import Terms, Tier

HEAVY = int(BUCKET_TOKENS)  # a job of so many tokens has a bucket of its own
LIGHT = HEAVY // 64 - 1  # with the token of its prompt
BUCKET_JOBS = 64
OTHER = Owner("other", None)


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    Tenants(database).create("other")
    return Intake(database, settings)


def bodies(count: int, max_tokens: int = HEAVY, prompt: str = "x") -> list[JobBody]:
    return [JobBody(prompt=prompt, max_tokens=max_tokens) for _ in range(count)]


def take(
    database: Database, count: int, tiers: tuple[Tier, Tier] = (Tier.INTERACTIVE, Tier.NORMAL)
) -> list[Claim]:
    return database.transact(partial(claim, worker_id="w", model="tiny", limit=count, tiers=tiers))


def owners(claims: list[Claim]) -> list[str]:
    return [item.tenant for item in claims]


def test_a_short_queue_finds_its_place_at_the_head_of_a_long_one(database: Database, intake: Intake) -> None:
    intake.accept_many(bodies(200), OPERATOR)
    intake.accept_many(bodies(3), OTHER)
    assert owners(take(database, 8)).count("other") == 3


def test_who_has_just_come_goes_before_what_was_claimed_last(database: Database, intake: Intake) -> None:
    """Also where many jobs share a bucket: a worker whose window is full finds them by their tags."""
    for taken in (10, BUCKET_JOBS, 3 * BUCKET_JOBS):
        intake.accept_many(bodies(4 * BUCKET_JOBS, max_tokens=LIGHT), OPERATOR)
        last = take(database, taken)[-1]
        intake.accept_many(bodies(3, max_tokens=LIGHT), OTHER)
        before = partial(claim, worker_id="w", model="tiny", limit=10, before=last.fair_tag)
        assert owners(database.transact(before)) == ["other"] * 3
        assert database.transact(before) == []


def test_who_was_there_first_is_not_passed_by_many(database: Database, intake: Intake) -> None:
    intake.accept_many(bodies(10, max_tokens=LIGHT), OTHER)
    intake.accept_many(bodies(8 * BUCKET_JOBS, max_tokens=LIGHT), OPERATOR)
    assert owners(take(database, BUCKET_JOBS // 2)).count("other") == 10


def test_who_uses_less_than_its_share_never_waits(database: Database, intake: Intake) -> None:
    intake.accept_many(bodies(400, max_tokens=LIGHT), OPERATOR)
    for _ in range(20):
        intake.accept_many(bodies(2, max_tokens=LIGHT), OTHER)
        assert owners(take(database, 6))[:2] == ["other"] * 2


def test_while_both_have_work_they_take_turns_by_weight(database: Database, intake: Intake) -> None:
    Tenants(database).change("other", weight=3.0)
    intake.accept_many(bodies(60), OPERATOR)
    intake.accept_many(bodies(60), OTHER)
    assert 27 <= owners(take(database, 40)).count("other") <= 33


def test_who_has_been_idle_gains_next_to_nothing_by_it(database: Database, intake: Intake) -> None:
    intake.accept_many(bodies(40), OPERATOR)
    take(database, 40)
    intake.accept_many(bodies(40), OPERATOR)
    take(database, 20)
    intake.accept_many(bodies(40), OTHER)
    assert 9 <= owners(take(database, 20)).count("other") <= 11


def test_many_small_submits_are_one_flow(database: Database, intake: Intake) -> None:
    for _ in range(20):
        intake.accept_one(bodies(1)[0], OPERATOR)
    intake.accept_many(bodies(20), OTHER)
    assert 4 <= owners(take(database, 10)).count("other") <= 6


def test_priority_doubles_the_share_with_each_step(database: Database, intake: Intake) -> None:
    intake.accept_many(bodies(90, prompt="low"), OPERATOR)
    intake.accept_many(bodies(90, prompt="high"), OPERATOR, terms=Terms(priority=2))
    prompts = [item.body["prompt"] for item in take(database, 50)]
    assert 38 <= prompts.count("high") <= 42


def test_inside_a_bucket_siblings_stay_together(database: Database, intake: Intake) -> None:
    mixed = [JobBody(prompt=f"template {i % 3}", max_tokens=10) for i in range(30)]
    intake.accept_many(mixed, OPERATOR)
    intake.accept_many(mixed, OTHER)
    taken = [(item.tenant, item.body["prompt"]) for item in take(database, 60)]
    assert sum(a != b for a, b in itertools.pairwise(taken)) == 5, "three templates of each of two tenants"


def test_tiers_come_before_tags(database: Database, intake: Intake) -> None:
    for tier in (Tier.BACKGROUND, Tier.NORMAL, Tier.INTERACTIVE):
        intake.accept_many(bodies(2), OPERATOR, terms=Terms(tier=tier))
    everything = (Tier.INTERACTIVE, Tier.BACKGROUND)
    assert [item.tier for item in take(database, 5, everything)] == [0, 0, 2, 2, 3]


def test_a_claim_leaves_other_tiers_alone(database: Database, intake: Intake) -> None:
    for tier in (Tier.BACKGROUND, Tier.NORMAL, Tier.INTERACTIVE):
        intake.accept_one(bodies(1)[0], OPERATOR, terms=Terms(tier=tier))
    assert [item.tier for item in take(database, 9, (Tier.INTERACTIVE, Tier.INTERACTIVE))] == [0]
    assert [item.tier for item in take(database, 9)] == [2]
    assert [item.tier for item in take(database, 9, (Tier.BACKGROUND, Tier.BACKGROUND))] == [3]


def test_two_submits_of_one_tenant_at_once_get_different_turns(database: Database, intake: Intake) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: intake.accept_many(bodies(5), OPERATOR), range(8)))
    tags = [item.fair_tag for item in take(database, 40)]
    assert sorted(set(tags)) == tags
    assert len(tags) == 40


def test_who_was_idle_while_the_queue_ran_empty_gains_nothing_by_it(
    database: Database, intake: Intake
) -> None:
    intake.accept_many(bodies(40), OPERATOR)
    take(database, 40)
    intake.accept_many(bodies(40), OTHER)
    intake.accept_many(bodies(40), OPERATOR)
    assert 8 <= owners(take(database, 20)).count("other") <= 12


def test_who_was_here_once_and_has_been_idle_since_gains_next_to_nothing_by_it(
    database: Database, intake: Intake
) -> None:
    intake.accept_many(bodies(1), OTHER)
    intake.accept_many(bodies(80), OPERATOR)
    take(database, 41)
    intake.accept_many(bodies(40), OTHER)
    assert 9 <= owners(take(database, 20)).count("other") <= 12


@pytest.mark.parametrize(("model", "tier"), [("busy", Tier.NORMAL), ("tiny", Tier.BACKGROUND)])
@pytest.mark.parametrize("left", [20, 0], ids=["queued", "taken"])
def test_every_model_and_tier_has_a_time_of_its_own(
    database: Database, intake: Intake, model: str, tier: Tier, left: int
) -> None:
    """However far another's has come, the first of all starts at 0."""
    busy = [JobBody(prompt="x", max_tokens=HEAVY, model=model)] * 40
    intake.accept_many(busy, OPERATOR, terms=Terms(tier=tier))
    database.transact(
        partial(claim, worker_id="w", model=model, limit=40 - left, tiers=(Tier.INTERACTIVE, Tier.BACKGROUND))
    )
    intake.accept_one(bodies(1)[0], OTHER)
    assert [item.fair_tag for item in take(database, 1)] == [0.0]
