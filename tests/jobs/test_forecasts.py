"""Forecasts on fixed figures: what is ahead, what it takes, and what is refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from jobs import queue_depth
from jobs.batch_reads import BatchReads, BatchView
from jobs.body import JobBody
from jobs.claims import claim
from jobs.database import Database
from jobs.dialects import now
from jobs.forecasts import Forecasts, WindowTooTight
from jobs.intake import Intake, Single
from jobs.job_rows import job_row, new_id
from jobs.leases import register
from jobs.models import Batch, Job, Worker
from jobs.queue_depth import QueueDepth, look
from jobs.quotas import QuotaExceeded
from jobs.reads import JobView, Reads
from jobs.settings import Settings
from jobs.tenants import DEFAULT, OPERATOR, Tenants
from jobs.terms import Terms, Tier
from tests.support.invariants import check_tallies
from tests.support.waiting import wait_until

BODY = JobBody(prompt="a" * 40, max_tokens=90)  # 100 estimated tokens
# 10 computed tokens per second, 1 of one sequence; half of what is estimated is computed.
PACE = {
    "tokens_per_second": 10.0,
    "steps_per_second": 1.0,
    "computed_tokens": 50.0,
    "estimated_tokens": 100.0,
}


def worker(database: Database, name: str = "w", model: str = "tiny", pace: Any = PACE, **values: Any) -> None:
    with database.write() as connection:
        register(connection, worker_id=name, model=model, lease_seconds=600)
        connection.execute(update(Worker).where(Worker.id == name).values(pace=pace, **values))


def clock(database: Database) -> float:
    with database.read() as connection:
        return connection.scalars(select(now())).one()


def submit(
    database: Database, settings: Settings, count: int, terms: Terms | None = None, **fields: Any
) -> str:
    body = BODY.model_copy(update=fields)
    return Intake(database, settings).accept_many([body] * count, OPERATOR, terms=terms or Terms())


def batch(database: Database, batch_id: str) -> BatchView:
    found = BatchReads(database).batch(batch_id, tenant=DEFAULT)
    assert found is not None
    return found


def job(database: Database, job_id: str) -> JobView:
    found = Reads(database).job(job_id, tenant=DEFAULT)
    assert found is not None
    return found


def spread(database: Database, *batch_ids: str) -> None:
    """One bucket of the fair tag after the other, as if handed in at different times."""
    with database.write() as connection:
        for i, batch_id in enumerate(batch_ids):
            connection.execute(update(Job).where(Job.batch_id == batch_id).values(fair_tag=float(i)))


def seconds_of(database: Database, settings: Settings, batch_id: str) -> float | None:
    """Until the batch is done, as a process that has just started says."""
    end = Forecasts(database, settings).of_batch(batch(database, batch_id)).end
    return None if end is None else end - clock(database)


def test_nothing_is_known_without_a_worker_that_has_measured(database: Database, settings: Settings) -> None:
    batch_id = submit(database, settings, 3)
    assert seconds_of(database, settings, batch_id) is None
    worker(database, pace=None)
    assert seconds_of(database, settings, batch_id) is None
    worker(database, "other", model="other")
    assert seconds_of(database, settings, batch_id) is None
    worker(database, "stopped", state="stopped")
    worker(database, "late", lease_until=1.0)
    worker(database, "draining", state="draining")
    assert seconds_of(database, settings, batch_id) is None
    speed_alone = PACE | {"computed_tokens": 0.0, "estimated_tokens": 0.0}
    worker(database, "fast", pace=speed_alone)
    assert seconds_of(database, settings, batch_id) is None, "what jobs make of their max_tokens is not known"


def test_a_batch_waits_for_those_ahead_of_it(database: Database, settings: Settings) -> None:
    worker(database)
    first, second = submit(database, settings, 20), submit(database, settings, 40)
    spread(database, first, second)
    # 20 jobs of 100 estimated, hence 50 computed tokens, at 10 a second.
    assert seconds_of(database, settings, first) == pytest.approx(100, abs=3)
    assert seconds_of(database, settings, second) == pytest.approx(300, abs=3)
    worker(database, "w2", pace=None)  # takes part; as fast as the other, until it is known better
    assert seconds_of(database, settings, second) == pytest.approx(150, abs=3)


def test_no_job_is_faster_than_its_own_tokens(database: Database, settings: Settings) -> None:
    worker(database)
    batch_id = submit(database, settings, 2)
    assert seconds_of(database, settings, batch_id) == pytest.approx(50, abs=3), "50 steps, one a second"
    with database.write() as connection:
        claim(connection, worker_id="w", model="tiny", limit=2)
        connection.execute(update(Job).values(started_at=Job.started_at - 30))
    assert seconds_of(database, settings, batch_id) == pytest.approx(20, abs=3), (
        "30 seconds of it have passed"
    )


def test_held_jobs_are_ahead_and_half_done(database: Database, settings: Settings) -> None:
    worker(database, num_running=10)
    first, second = submit(database, settings, 20), submit(database, settings, 20)
    spread(database, first, second)
    with database.write() as connection:
        assert len(claim(connection, worker_id="w", model="tiny", limit=20)) == 20
    # Of 20 held jobs 10 run, and are taken as half done: 75 seconds of 100.
    assert seconds_of(database, settings, first) == pytest.approx(75, abs=3)
    assert seconds_of(database, settings, second) == pytest.approx(175, abs=3)


def test_tiers_go_first(database: Database, settings: Settings) -> None:
    worker(database)
    normal = submit(database, settings, 20)
    background = submit(database, settings, 20, Terms(tier=Tier.BACKGROUND))
    urgent = submit(database, settings, 20, Terms(tier=Tier.URGENT))
    found = [seconds_of(database, settings, name) for name in (urgent, normal, background)]
    assert found == [pytest.approx(seconds, abs=3) for seconds in (100, 200, 300)]


def test_a_batch_for_two_models_takes_as_long_as_the_slower(database: Database, settings: Settings) -> None:
    worker(database)
    worker(database, "w2", model="slow", pace=PACE | {"tokens_per_second": 5.0})
    intake = Intake(database, settings)
    bodies = [BODY, BODY.model_copy(update={"model": "slow"})] * 10
    bodies = [body.model_copy(update={"model": body.model or "tiny"}) for body in bodies]
    batch_id = intake.accept_many(bodies, OPERATOR)
    assert seconds_of(database, settings, batch_id) == pytest.approx(100, abs=3)
    with database.write() as connection:
        connection.execute(update(Worker).where(Worker.id == "w2").values(state="stopped"))
    assert seconds_of(database, settings, batch_id) is None, "a part of it waits for nobody knows whom"


def test_jobs_one_by_one(database: Database, settings: Settings) -> None:
    worker(database)
    ahead = submit(database, settings, 30)
    job_id = Intake(database, settings).accept_one(BODY, OPERATOR)
    later = Intake(database, settings).accept_one(
        BODY, OPERATOR, terms=Terms(not_before=clock(database) + 1000)
    )
    with database.write() as connection:
        connection.execute(update(Job).where(Job.batch_id == ahead).values(fair_tag=-1.0))
    forecasts = Forecasts(database, settings)

    def seconds(name: str) -> float:
        end = forecasts.of_job(job(database, name)).end
        assert end is not None
        return end - clock(database)

    assert seconds(job_id) == pytest.approx(155, abs=3)
    assert seconds(later) == pytest.approx(1050, abs=3), "and nobody waits for it meanwhile"
    with database.write() as connection:
        connection.execute(update(Job).where(Job.id == job_id).values(state="cancelled"))
    assert forecasts.of_job(job(database, job_id)) == (None, None)


def test_ended_batches_have_no_forecast(database: Database, settings: Settings) -> None:
    worker(database)
    batch_id = submit(database, settings, 2)
    with database.write() as connection:
        connection.execute(update(Batch).values(state="cancelling"))
    assert seconds_of(database, settings, batch_id) is None


def test_a_window_that_cannot_be_met(database: Database, settings: Settings) -> None:
    worker(database)
    start = clock(database)
    submit(database, settings, 40, Terms(deadline=start + 210))  # 200 seconds
    soon = Terms(deadline=start + 212)
    with pytest.raises(WindowTooTight) as caught:
        submit(database, settings, 6, soon)
    assert caught.value.retry_after == pytest.approx(18, abs=4)
    assert "tiny" in caught.value.message
    submit(database, settings, 2, soon)
    with pytest.raises(WindowTooTight):
        Intake(database, settings).accept_one(BODY, OPERATOR, terms=soon)
    with pytest.raises(WindowTooTight) as caught:
        submit(database, settings, 50, soon)
    assert caught.value.retry_after is None, "it is too much by itself"
    assert look_at(database) == 4200, "nothing of a refused submit is left"
    submit(database, settings, 2, Terms(deadline=start + 300))
    submit(database, settings, 2)
    with database.read() as connection:
        check_tallies(connection)


def test_who_has_no_deadline_gives_way(database: Database, settings: Settings) -> None:
    worker(database)
    submit(database, settings, 40)  # 200 seconds
    submit(database, settings, 2, Terms(deadline=clock(database) + 100))


def look_at(database: Database) -> int:
    with database.read() as connection:
        return look(connection).queues["tiny"].tokens_queued


def test_refusals_are_made_on_evidence_and_can_be_turned_off(database: Database, settings: Settings) -> None:
    submit(database, settings, 40, Terms(deadline=clock(database) + 390))
    soon = Terms(deadline=clock(database) + 1)
    submit(database, settings, 1, soon)  # nobody knows
    worker(database)
    submit(database, settings.model_copy(update={"promise_refuse": False}), 1, soon)
    careful = settings.model_copy(update={"promise_slack": 3.0})
    in_time = Terms(deadline=clock(database) + 400)
    with pytest.raises(WindowTooTight):
        submit(database, careful, 1, in_time)
    submit(database, settings, 1, in_time)


def test_a_quota_is_asked_before_the_window(database: Database, settings: Settings) -> None:
    worker(database)
    submit(database, settings, 40)
    Tenants(database).change(DEFAULT, quotas={"queued_jobs": 40})
    with pytest.raises(QuotaExceeded):
        submit(database, settings, 1, Terms(deadline=clock(database) + 1))
    with pytest.raises(QuotaExceeded):
        Intake(database, settings).accept_one(BODY, OPERATOR, terms=Terms(deadline=clock(database) + 1))


def test_who_is_refused_for_its_window_takes_no_room_from_who_comes_with_it(
    database: Database, settings: Settings
) -> None:
    worker(database)
    submit(database, settings, 40, Terms(tier=Tier.URGENT))
    Tenants(database).change(DEFAULT, quotas={"queued_jobs": 41})
    named = BODY.model_copy(update={"model": "tiny"})
    singles = [
        Single(job_row(new_id("job"), named, OPERATOR, settings, source="http", terms=terms), terms)
        for terms in (Terms(deadline=clock(database) + 1), Terms())
    ]
    tight, other = Intake(database, settings)._accept_singles(singles)
    assert isinstance(tight, WindowTooTight)
    assert isinstance(other, JobView)
    assert other.id == singles[1].id
    with database.read() as connection:
        check_tallies(connection)


def test_a_picture_is_kept_and_a_great_change_seen_at_once(database: Database, settings: Settings) -> None:
    forecasts = Forecasts(database, settings)
    intake = Intake(database, settings, forecasts)
    worker(database)
    depth = forecasts._depth
    intake.accept_many([BODY] * 100, OPERATOR)
    first = depth.picture()
    assert first.queues["tiny"].tokens_queued == 10_000
    intake.accept_one(BODY, OPERATOR)
    assert depth.picture() is first, "one more in a hundred is no reason to look again"
    intake.accept_many([BODY] * 20, OPERATOR)
    assert depth.picture().queues["tiny"].tokens_queued == 12_100
    depth._until = 0.0  # its time is over
    assert depth.picture() is not first


def test_one_huge_max_tokens_is_no_great_change(database: Database, settings: Settings) -> None:
    """Or one client's submits would have the whole queue summed up again and again, while readers wait."""
    forecasts = Forecasts(database, settings)
    intake = Intake(database, settings, forecasts)
    worker(database, max_model_len=200)
    intake.accept_many([BODY] * 100, OPERATOR)
    first = forecasts._depth.picture()
    forecasts._depth._until = time.monotonic() + 600  # however slow this machine is
    intake.accept_one(BODY.model_copy(update={"max_tokens": 1_000_000}), OPERATOR)
    assert forecasts._depth.picture() is first


def test_a_change_while_the_picture_is_taken_is_not_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    depth = QueueDepth(database)

    def look_and_change(connection: Any) -> Any:
        picture = look(connection)
        depth.changed("tiny", 100)
        return picture

    monkeypatch.setattr(queue_depth, "look", look_and_change)
    old = depth.picture()
    monkeypatch.setattr(queue_depth, "look", look)
    assert depth.picture() is not old


def test_a_slow_picture_is_renewed_beside_its_readers(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = QueueDepth(database)
    old = depth.picture()
    depth._cost, depth._until = 1.0, time.monotonic()
    assert depth.picture() is old
    fresh = wait_until(lambda: depth._picture is not old and depth._picture, "it is renewed")
    assert depth.picture() is fresh
    assert depth._cost < 1.0
    monkeypatch.setattr(queue_depth, "COST_FACTOR", 1000.0)
    depth._cost, depth._until = 0.0, 0.0  # of one that is made at once, however slow this machine is now
    depth.picture()
    assert depth._until > time.monotonic() + depth._cost * 500


def test_a_slow_picture_of_long_ago_is_shown_to_nobody(database: Database) -> None:
    """Nobody asked for hours; a worker came meanwhile."""
    depth = QueueDepth(database)
    assert depth.picture().queues == {}
    worker(database)
    depth._cost, depth._until = 1.0, time.monotonic() - 3600
    assert len(depth.picture().queues["tiny"].workers) == 1


def test_a_long_queue_is_one_sum_per_place(database: Database, settings: Settings) -> None:
    row = job_row(new_id("job"), BODY.model_copy(update={"model": "tiny"}), OPERATOR, settings, source="http")
    row |= {"created_at": 1.0, "fence": 0, "crashes": 0}
    rows = [row | {"id": f"job_{i:08}", "fair_tag": float(i // 100)} for i in range(2000)]
    with database.write() as connection:
        connection.execute(insert(Job), rows)
        queue = look(connection).queues["tiny"]
    assert (len(queue.places), queue.tokens_queued) == (20, 200_000)
    assert [queue.ahead(2, tag) for tag in (-1.0, 0.0, 9.0, 9.5, 99.0)] == [
        0,
        10_000,
        100_000,
        100_000,
        200_000,
    ]
    assert (queue.ahead(1), queue.ahead(3)) == (0, 200_000)


def test_a_job_counts_for_no_more_than_a_context_holds(database: Database, settings: Settings) -> None:
    """Who asks for a million tokens, to say "as many as you like", moves nobody's forecast by hours."""
    worker(database, max_model_len=1000)
    worker(database, "older", max_model_len=500, state="stopped")
    worker(database, "w2", model="unknown")
    greedy, asked = submit(database, settings, 2, max_tokens=1_000_000), submit(database, settings, 20)
    spread(database, greedy, asked)
    # 2 of 1,000 and 20 of 100 estimated tokens, half of which are computed, 10 a second.
    assert seconds_of(database, settings, asked) == pytest.approx(200, abs=3)
    assert seconds_of(database, settings, greedy) == pytest.approx(500, abs=3), "its own 500, one a second"
    submit(database, settings, 1, Terms(deadline=clock(database) + 300), max_tokens=1_000_000)
    submit(database, settings, 1, Terms(deadline=clock(database) + 300))
    with database.write() as connection:
        assert len(claim(connection, worker_id="w", model="tiny", limit=2)) == 2
    with database.read() as connection:
        assert look(connection).queues["tiny"].held_tokens == 2000
    submit(database, settings, 1, max_tokens=5_000, model="unknown")
    with database.read() as connection:
        assert look(connection).queues["unknown"].tokens_queued == 5_010


def test_models_that_nobody_serves_are_named(database: Database, settings: Settings) -> None:
    """Of what waits, until a worker that takes jobs is there, be it still loading."""
    bodies = [BODY.model_copy(update={"model": name}) for name in ("tiny", "gone", "loading", "gone")]
    batch_id = Intake(database, settings).accept_many(bodies, OPERATOR)
    job_id = Intake(database, settings).accept_one(bodies[1], OPERATOR)
    worker(database)
    worker(database, "late", model="gone", lease_until=1.0)
    worker(database, "leaving", model="gone", state="draining")
    worker(database, "new", model="loading", state="starting", pace=None)
    forecasts = Forecasts(database, settings)
    assert forecasts.of_batch(batch(database, batch_id)) == (None, ("gone",))
    assert forecasts.of_job(job(database, job_id)) == (None, ("gone",))
    worker(database, "back", model="gone")
    forecasts = Forecasts(database, settings)
    assert forecasts.of_batch(batch(database, batch_id)).unserved == ()
    assert forecasts.of_job(job(database, job_id)).unserved == ()
