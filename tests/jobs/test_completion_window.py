"""How long a submit may take, as clients spell it."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.bad_field import BadField
from jobs.completion_window import terms_of_window, window_seconds
from jobs.terms import Terms, Tier


@pytest.mark.parametrize(
    ("window", "seconds"),
    [("60s", 60), ("1m", 60), ("24h", 86_400), ("7d", 604_800), ("30d", 2_592_000), ("background", None)],
)
def test_a_window_is_a_number_with_its_unit(window: str, seconds: float | None) -> None:
    assert window_seconds(window) == seconds


@pytest.mark.parametrize(
    "window",
    [
        "",
        "24",
        "h",
        "24 h",
        "24H",
        "-1h",
        "0h",
        "01h",
        "59s",
        "31d",
        "1e3s",
        "٣h",
        "24h\n",
        "99999999999d",
        None,
        24,
        [],
    ],
)
def test_anything_else_is_refused_by_name(window: Any) -> None:
    with pytest.raises(BadField) as refusal:
        window_seconds(window)
    assert refusal.value.param == "completion_window"
    assert "24h" in refusal.value.message


def test_a_window_is_a_deadline_or_the_background() -> None:
    assert terms_of_window("1h", submitted_at=1000.0) == Terms(deadline=4600.0)
    assert terms_of_window("background", submitted_at=1000.0) == Terms(tier=Tier.BACKGROUND)
