"""The nightly run: a schedule fires by itself, and every batch says when it will be done."""

from __future__ import annotations

import pytest
from sqlalchemy import select, update

from jobs.dialects import now
from jobs.models import Job, Schedule, Worker
from jobs.states import JobState
from tests.support.press import FINISH_SECONDS, START_SECONDS, Press
from tests.support.stories import long_jobs, short_jobs
from tests.support.waiting import wait_until


def test_a_schedule_fires_by_itself(press: Press) -> None:
    (worker,) = press.start_workers(1)
    made = press.http.post(
        "/v1/schedules", json={"name": "nightly", "cron": "30 1 * * *", "jobs": short_jobs(20)}
    )
    assert made.status_code == 201, made.text
    address = f"/v1/schedules/{made.json()['id']}"
    with press.database.write() as connection:  # half past one has just come
        connection.execute(update(Schedule).values(next_at=now() - 1))

    def runs() -> list[dict[str, str]]:
        return list(press.http.get(f"{address}/runs").json()["data"])

    (run,) = wait_until(runs, "it fires", START_SECONDS)
    press.accepted |= set(press.jobs(Job.batch_id == run["batch_id"]))
    assert len(press.accepted) >= 20
    wait_until(
        lambda: press.batch(run["batch_id"])["status"] == "completed", "its batch is done", FINISH_SECONDS
    )
    assert press.batch(run["batch_id"])["schedule_id"] == made.json()["id"]
    assert press.finish()[JobState.COMPLETED] == 20
    assert [one["kind"] for one in runs()] == ["scheduled"], "once, though the api and a worker have looked"
    assert worker.alive
    assert press.http.delete(address).status_code == 200


def test_who_asks_for_a_million_tokens_does_not_move_all_forecasts(press: Press) -> None:
    """A worker that learned from such answers, as short as any, would promise a thousand times too much."""
    (worker,) = press.start_workers(1)

    def estimated() -> float:
        row = press.worker(worker)
        assert row is not None
        return float((row["pace"] or {}).get("estimated_tokens", 0.0))

    before = estimated()
    job = {"prompt": "x", "max_tokens": 1_000_000, "structured_outputs": {"choice": ["yes", "no"]}}
    batch_id = press.submit([*[job] * 5, *long_jobs(16, 400)])  # some work, for a speed to be measured
    assert press.batch(batch_id)["unserved_models"] in ([], None)  # None: it has ended
    assert press.finish()[JobState.COMPLETED] == 21
    wait_until(lambda: estimated() > before, "the worker has reported", START_SECONDS)
    assert estimated() <= before + 5 * 8192 + 16 * 500


@pytest.mark.long
def test_a_batch_says_when_it_will_be_done(press: Press) -> None:
    press.start_workers(0)
    with press.database.write() as connection:  # as on the first day: nothing was ever measured
        connection.execute(update(Worker).values(pace=None))

    def estimate(batch_id: str) -> int | None:
        found: int | None = press.batch(batch_id)["estimated_completion_at"]
        return found

    # Of the second so many that they are not done before anybody has looked: workers report once per second, and the
    # api takes a picture of the queue once per second.
    first, second = press.submit(long_jobs(64, 150)), press.submit(long_jobs(3000, 150))
    assert estimate(first) is None
    assert press.batch(first)["unserved_models"] == ["tiny"]
    press.start("worker", ["worker"])
    wait_until(lambda: estimate(second) is not None, "something is measured", FINISH_SECONDS, interval=0.05)
    sooner, later = estimate(first), estimate(second)
    with press.database.read() as connection:
        time_now = connection.scalars(select(now())).one()
    assert later is not None, "3,000 jobs are not done in a few seconds"
    assert later > time_now - 5, "a moment in the past is no estimate"
    assert sooner is None or sooner <= later + 1
    assert press.http.post(f"/v1/batches/{second}/cancel").status_code == 200
    press.finish()
    assert (estimate(first), estimate(second)) == (None, None)
    press.start_workers(0)
    press.start_workers(1)
    again = press.submit(long_jobs(64, 150))
    assert estimate(again) is not None, "the next worker knows what the last one learned"
    press.finish()
