"""Holdings: what is counted while jobs come and go is what a count of all of them would give."""

from __future__ import annotations

import random
from collections import Counter

from jobs.claims import Claim
from jobs.holdings import Holdings
from jobs.terms import Tier


def claim(number: int, tenant: str, tier: Tier) -> Claim:
    return Claim(f"job-{number}", 1, {}, 0, 0, "http", tenant, tier, 0.0, None)


def test_counts_follow_what_comes_and_goes() -> None:
    rng = random.Random(7)
    holdings, number = Holdings(), 0
    for _ in range(60):
        some = [
            claim(number + i, rng.choice("abc"), rng.choice([Tier.NORMAL, Tier.BACKGROUND]))
            for i in range(rng.randint(0, 5))
        ]
        number += len(some)
        holdings.add(some)
        here = [holding.id for holding in holdings.all()]
        gone = rng.sample(here, min(len(here), rng.randint(0, 5)))
        holdings.remove([*gone, *gone])  # the second time it is not here
        held = holdings.all()
        assert dict(holdings.of_tenants) == Counter(one.claim.tenant for one in held)
        assert holdings.num_background == sum(one.in_background for one in held)
    holdings.clear()
    assert not holdings.of_tenants
    assert holdings.num_background == 0


def test_a_copy_of_the_counts_is_the_callers_own() -> None:
    holdings = Holdings()
    holdings.add([claim(1, "a", Tier.NORMAL)])
    holdings.of_tenants["a"] += 5
    assert holdings.of_tenants == {"a": 1}


def test_who_may_end_a_holding() -> None:
    """Whoever comes first: the engine once it was sent, before that whoever drops it."""
    holdings = Holdings()
    one, two, three = holdings.add(claim(number, "a", Tier.NORMAL) for number in range(3))
    assert holdings.mark_dropped(one)
    assert not holdings.mark_dropped(one), "one end is enough"
    assert not holdings.mark_sent(one)
    assert holdings.mark_sent(two)
    assert not holdings.mark_dropped(two), "only the engine can end it"
    holdings.clear()
    assert not holdings.mark_sent(three), "it is no longer ours"
