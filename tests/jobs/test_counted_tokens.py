"""Jobs of several samples in forecasts: all of them are ahead of others, and each is made beside the others."""

from __future__ import annotations

from functools import partial

import pytest

from jobs.claims import claim
from jobs.counted_tokens import counted
from jobs.database import Database
from jobs.forecasts import Forecasts
from jobs.pace import Pace
from jobs.settings import Settings
from tests.jobs.test_forecasts import clock, job, seconds_of, spread, submit, worker
from tests.support import rows


def test_each_sample_counts_up_to_the_context() -> None:
    assert [counted(8_000, 4, context) for context in (None, 3_000, 1_000)] == [8_000, 8_000, 4_000]


def test_samples_are_ahead_of_others(database: Database, settings: Settings) -> None:
    """10 computed tokens a second, half of what is estimated."""
    worker(database, max_model_len=100)
    many = submit(database, settings, 5, n=4, max_tokens=1_000_000)
    after = submit(database, settings, 5)
    spread(database, many, after)
    assert seconds_of(database, settings, many) == pytest.approx(100, abs=3), "as 20 jobs of a whole context"
    assert seconds_of(database, settings, after) == pytest.approx(125, abs=3)


def test_samples_of_a_job_do_not_wait_for_each_other(database: Database, settings: Settings) -> None:
    worker(database)
    batch_id = submit(database, settings, 1, n=4)
    # 360 tokens and the prompt, of which half: 18 seconds of the engine, and one sample needs 46 steps.
    assert seconds_of(database, settings, batch_id) == pytest.approx(46, abs=3)
    (name,) = rows.jobs_by_state(database)["queued"]
    end = Forecasts(database, settings).of_job(job(database, name)).end
    assert end is not None
    assert end - clock(database) == pytest.approx(46, abs=3)


def test_what_runs_is_told_in_sequences(database: Database, settings: Settings) -> None:
    worker(database, num_running=20)
    first, second = submit(database, settings, 10, n=4), submit(database, settings, 1)
    spread(database, first, second)
    database.transact(partial(claim, worker_id="w", model="tiny", limit=10))
    # Of 40 samples, 3700 tokens together, 20 run and are taken as half done: three quarters of 185 seconds.
    assert seconds_of(database, settings, first) == pytest.approx(139, abs=3)


def test_the_pace_is_learned_under_the_same_rule() -> None:
    pace = Pace()
    pace.context = 1_000
    pace.completed(computed_tokens=50, estimated_tokens=1_000_000, num_samples=4)
    assert pace.figures.estimated_tokens == 4_000


def test_a_worker_is_told_of_the_samples(database: Database, settings: Settings) -> None:
    worker(database)
    submit(database, settings, 1, n=4)
    (one,) = database.transact(partial(claim, worker_id="w", model="tiny", limit=1))
    assert one.num_samples == 4
