"""Wake-ups: a handful in Redis, however many jobs there are, and a dead Redis harms nobody."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import redis
from celery import Celery

from jobs.broker import make_app, work_queue
from jobs.database import Database
from jobs.leases import leave, register
from jobs.settings import Settings
from jobs.wakeups import APART_SECONDS, ENOUGH_IN_REDIS, REPEAT_SECONDS, WakeUps
from tests.support.waiting import wait_until


def serve(database: Database, *models: str) -> None:
    """Have a live worker for each of them, called like it."""
    for model in models:
        database.transact(partial(register, worker_id=model, model=model, lease_seconds=60.0))


def test_a_queue_never_holds_more_than_a_handful(app: Celery, database: Database, redis_url: str) -> None:
    serve(database, "tiny")
    wake_ups = WakeUps(app, database)
    with redis.Redis.from_url(redis_url) as client:
        for count in range(1, ENOUGH_IN_REDIS + 1):
            wake_ups.wake("tiny")
            wait_until(
                lambda expected=count: client.llen(work_queue("tiny")) == expected, f"{count} wake-ups"
            )
        for _ in range(200):
            wake_ups.wake("tiny")
        wake_ups.close()
        assert client.llen(work_queue("tiny")) == ENOUGH_IN_REDIS
        client.flushdb()


def test_who_says_it_again_and_again_is_heard_at_once_and_then_now_and_then(
    app: Celery, database: Database, redis_url: str
) -> None:
    serve(database, "tiny")
    wake_ups = WakeUps(app, database)
    with redis.Redis.from_url(redis_url) as client:
        heard: list[float] = []

        def hear() -> bool:
            wake_ups.repeat("tiny")
            if client.lpop(work_queue("tiny")):
                heard.append(time.monotonic())
            return len(heard) == 4

        begin = time.monotonic()
        wait_until(hear, "it is said four times", interval=0.001)
        assert heard[3] - begin >= 3 * REPEAT_SECONDS * 0.9
        wake_ups.repeat("tiny")  # the last word is said, also by who then says no more
        wait_until(lambda: client.lpop(work_queue("tiny")), "the last one")
        wake_ups.repeat("tiny")
        wake_ups.wake("tiny")  # others do not wait
        wake_ups.close()
        assert client.llen(work_queue("tiny")) in (1, 2)
        client.flushdb()


def test_what_is_said_right_after_another_is_heard_a_moment_later(
    app: Celery, database: Database, redis_url: str
) -> None:
    serve(database, "tiny")
    wake_ups = WakeUps(app, database)
    with redis.Redis.from_url(redis_url) as client:
        heard: list[float] = []

        def hear(model: str) -> bool:
            if client.lpop(work_queue(model)):
                heard.append(time.monotonic())
                return True
            return False

        serve(database, *(f"other-{number}" for number in range(5)))
        for number in range(5):
            wake_ups.wake("tiny")
            wait_until(lambda: hear("tiny"), "it is said", interval=0.001)
            wake_ups.wake(f"other-{number}")  # waits for nobody
            wait_until(lambda name=f"other-{number}": hear(name), "another is said", interval=0.001)
        assert heard[-2] - heard[0] >= 3 * APART_SECONDS
        wait_until(lambda: time.monotonic() > heard[-1] + APART_SECONDS, "all of it is long ago")
        wake_ups.wake("tiny")
        wait_until(lambda: hear("tiny"), "the last is said")
        assert set(wake_ups._quiet_until) == {"tiny"}, "names that clients made up do not stay"
        wake_ups.close()
        client.flushdb()


def test_names_that_nobody_serves_hold_nobody_up_and_leave_nothing(
    app: Celery, database: Database, redis_url: str
) -> None:
    serve(database, "tiny", "gone")
    database.transact(partial(leave, worker_id="gone"))
    wake_ups = WakeUps(app, database)
    with redis.Redis.from_url(redis_url) as client:
        for number in range(10_000):
            wake_ups.wake(f"junk-{number}")
        wake_ups.wake("gone")
        begin = time.monotonic()
        wake_ups.wake("tiny")
        wait_until(lambda: client.llen(work_queue("tiny")), "it is said", interval=0.001)
        assert time.monotonic() - begin < 2.0
        serve(database, "junk-7")  # a worker came: what is said from now on is for it
        wake_ups.wake("junk-7")
        wait_until(lambda: client.llen(work_queue("junk-7")), "this is said, too")
        wake_ups.close()
        named = {key.rpartition(b"work.")[2] for key in client.scan_iter(count=1000)}
        assert {name for name in named if name.startswith((b"junk", b"gone"))} == {b"junk-7"}
        client.flushdb()


def test_who_was_first_is_told_first(app: Celery, database: Database, redis_url: str) -> None:
    models = [f"model-{number}" for number in range(30, 0, -1)]
    serve(database, *models)
    wake_ups = WakeUps(app, database)
    with redis.Redis.from_url(redis_url, socket_timeout=10) as client, client.monitor() as commands:
        for model in models * 3:
            wake_ups.wake(model)
        said: list[str] = []
        while len(said) < len(models):
            command = commands.next_command()["command"].split()
            if command[0] == "LPUSH" and command[1] not in said:
                said.append(command[1])
        assert said == [work_queue(model) for model in models]
        wake_ups.close()
        client.flushdb()


def test_a_dead_redis_is_only_a_line_in_the_log(database: Database, tmp_path: Path) -> None:
    app = make_app(Settings(data_dir=tmp_path, model="tiny", redis_url=f"unix://{tmp_path}/nobody.sock"))
    serve(database, "tiny")
    wake_ups = WakeUps(app, database)
    wake_ups.wake("tiny")
    wake_ups.close()
    app.close()
