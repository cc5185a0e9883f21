"""What a worker learns about its speed, from fixed counters."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from jobs.database import Database
from jobs.leases import register
from jobs.models import Worker
from jobs.pace import Figures, Pace, figures_of, last_known


def stats(busy_seconds: float, tokens: int, steps: int) -> dict[str, int | float]:
    return {"busy_seconds": busy_seconds, "num_computed_tokens": tokens, "num_steps": steps}


def test_nothing_is_known_before_something_was_computed() -> None:
    pace = Pace()
    pace.observe({})
    pace.observe(stats(0.0, 0, 0))
    pace.completed(computed_tokens=5, estimated_tokens=10)
    assert pace.figures.stored() is None


def test_the_first_measurement_counts_whole() -> None:
    pace = Pace()
    pace.observe(stats(2.0, 1000, 50))
    assert (pace.figures.tokens_per_second, pace.figures.steps_per_second) == (500.0, 25.0)


def test_an_idle_engine_changes_nothing() -> None:
    pace = Pace()
    pace.observe(stats(2.0, 1000, 50))
    before = pace.figures
    for _ in range(100):
        pace.observe(stats(2.0, 1000, 50))
    assert pace.figures == before


def test_short_intervals_add_up() -> None:
    pace = Pace()
    for i in range(1, 11):
        pace.observe(stats(0.01 * i, 10 * i, i))
    assert pace.figures.tokens_per_second == pytest.approx(1000.0)


def test_stragglers_hardly_count_and_a_full_engine_does() -> None:
    pace = Pace()
    pace.observe(stats(60.0, 60_000, 600))
    pace.observe(stats(660.0, 60_000 + 600 * 20, 6600))  # ten minutes with two sequences
    after_stragglers = pace.figures.tokens_per_second
    assert after_stragglers is not None
    assert 800 < after_stragglers < 1000
    pace = Pace(Figures(tokens_per_second=20.0, steps_per_second=10.0))
    pace.observe(stats(60.0, 60_000, 600))
    assert pace.figures.tokens_per_second == pytest.approx(1000.0, rel=0.01)


def test_a_new_engine_process_counts_from_zero() -> None:
    pace = Pace()
    pace.observe(stats(10.0, 10_000, 100))
    pace.observe(stats(1.0, 1000, 10))
    assert pace.figures.tokens_per_second == pytest.approx(1000.0)


def test_newer_jobs_say_more_about_estimates() -> None:
    pace = Pace()
    for _ in range(1000):
        pace.completed(computed_tokens=100, estimated_tokens=100)
    for _ in range(1000):
        pace.completed(computed_tokens=10, estimated_tokens=100)
    share = pace.figures.computed_tokens / pace.figures.estimated_tokens
    assert share == pytest.approx(0.1, abs=0.02)


def test_a_new_worker_knows_what_the_last_one_knew(database: Database) -> None:
    def known(model: str = "tiny", host: str = "here") -> float | None:
        with database.read() as connection:
            return last_known(connection, model=model, host=host).tokens_per_second

    assert known() is None
    rows = (
        ("a", "tiny", "here", 1),
        ("b", "tiny", "there", 2),
        ("c", "other", "here", 3),
        ("d", "tiny", "x", None),
    )
    with database.write() as connection:
        for name, model, host, speed in rows:
            register(connection, worker_id=name, model=model, lease_seconds=60)
            figures = Figures(speed, 1.0, 4.0, 8.0)
            connection.execute(
                update(Worker).where(Worker.id == name).values(host=host, pace=figures.stored())
            )
    assert (known(), known(host="there"), known("other"), known("unknown")) == (1, 2, 3, None)
    assert known(host="elsewhere") == 2, "of any host, the latest"


def test_stored_figures_of_another_version_are_read() -> None:
    assert figures_of({"tokens_per_second": 3.0, "new": 1}) == Figures(tokens_per_second=3.0)


def test_one_huge_max_tokens_says_little_of_what_answers_take() -> None:
    pace = Pace()
    pace.observe(stats(2.0, 1000, 50))
    pace.context = 1000
    for _ in range(100):
        pace.completed(computed_tokens=50, estimated_tokens=100)
    pace.completed(computed_tokens=50, estimated_tokens=1_000_000)
    share = pace.figures.computed_tokens / pace.figures.estimated_tokens
    assert share == pytest.approx(0.44, abs=0.03), "without the limit 0.004: all seems done in a moment"
