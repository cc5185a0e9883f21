"""Terms as clients spell them: what is taken, what is refused, and under which name."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.bad_field import BadField
from jobs.terms import DELAYED, ORDINARY, Retry, Terms, Tier, tier_of
from jobs.terms_body import split_terms

NOW = 1_800_000_000.0


def test_a_body_without_terms_is_left_as_it_is() -> None:
    body = {"prompt": "a", "max_tokens": 3}
    assert split_terms(body, clock=lambda: NOW) == (ORDINARY, body)
    assert split_terms(body | {"deadline": None}, clock=lambda: NOW) == (ORDINARY, body)


@pytest.mark.parametrize(
    "given", [{}, {"priority": 1, "tier": "background", "retry": {"max_attempts": 2}}, {"deadline": None}]
)
def test_who_names_no_moment_waits_for_no_clock(given: dict[str, Any]) -> None:
    split_terms({"prompt": "a"} | given, clock=lambda: pytest.fail("it was asked"))


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        ({"priority": 4}, Terms(priority=4)),
        ({"tier": "background"}, Terms(tier=Tier.BACKGROUND)),
        ({"tier": "normal", "deadline": NOW + 5}, Terms(deadline=NOW + 5)),
        ({"completion_window": "1h"}, Terms(deadline=NOW + 3600)),
        ({"completion_window": "background"}, Terms(tier=Tier.BACKGROUND)),
        ({"completion_window": "1h", "tier": "normal"}, Terms(deadline=NOW + 3600)),
        ({"not_before": NOW + 9.5}, Terms(not_before=NOW + 9.5)),
        ({"not_before": NOW - 9}, Terms()),
        ({"retry": {"max_attempts": 3}}, Terms(retry=Retry(max_attempts=3))),
        (
            {"retry": {"max_attempts": 2, "backoff_seconds": 1.5, "max_backoff_seconds": 4}},
            Terms(retry=Retry(max_attempts=2, backoff_seconds=1.5, max_backoff_seconds=4.0)),
        ),
    ],
)
def test_terms_are_taken_out_of_the_body(given: dict[str, Any], terms: Terms) -> None:
    assert split_terms({"prompt": "a"} | given, clock=lambda: NOW) == (terms, {"prompt": "a"})


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"priority": 5}, "priority"),
        ({"priority": 1.0}, "priority"),
        ({"priority": True}, "priority"),
        ({"tier": "interactive"}, "tier"),
        ({"tier": "urgent"}, "tier"),
        ({"deadline": NOW}, "deadline"),
        ({"deadline": "tomorrow"}, "deadline"),
        ({"deadline": float("inf")}, "deadline"),
        ({"deadline": NOW + 367 * 86_400}, "deadline"),
        ({"deadline": NOW + 5, "tier": "background"}, "deadline"),
        ({"deadline": NOW + 5, "completion_window": "1h"}, "completion_window"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"not_before": NOW + 5, "deadline": NOW + 5}, "not_before"),
        ({"not_before": -1}, "not_before"),
        ({"not_before": NOW + 367 * 86_400}, "not_before"),
        ({"retry": 3}, "retry"),
        ({"retry": {}}, "retry.max_attempts"),
        ({"retry": {"max_attempts": 21}}, "retry.max_attempts"),
        ({"retry": {"max_attempts": 2, "backoff_seconds": 0}}, "retry.backoff_seconds"),
        ({"retry": {"max_attempts": 2, "forever": True}}, "retry.forever"),
    ],
)
def test_terms_that_cannot_be_kept_are_refused_by_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(BadField) as refusal:
        split_terms({"prompt": "a"} | given, clock=lambda: NOW)
    assert refusal.value.param == param


def test_a_delayed_row_remembers_its_tier() -> None:
    columns = Terms(tier=Tier.BACKGROUND, not_before=5.0).columns()
    assert columns["tier"] == Tier.BACKGROUND + DELAYED
    assert tier_of(columns["tier"]) is Tier.BACKGROUND
    assert Terms(tier=Tier.BACKGROUND).columns()["tier"] == Tier.BACKGROUND


def test_the_wait_doubles_up_to_its_limit() -> None:
    retry = Retry(max_attempts=9, backoff_seconds=3.0, max_backoff_seconds=20.0)
    assert [retry.delay(number) for number in range(1, 6)] == [3.0, 6.0, 12.0, 20.0, 20.0]
