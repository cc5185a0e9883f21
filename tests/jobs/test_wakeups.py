"""Wake-ups: a handful in Redis, however many jobs there are, and a dead Redis harms nobody."""

from __future__ import annotations

import time
from pathlib import Path

import redis

from jobs.broker import make_app, work_queue
from jobs.settings import Settings
from jobs.wakeups import APART_SECONDS, ENOUGH_IN_REDIS, REPEAT_SECONDS, WakeUps
from tests.support.waiting import wait_until


def test_a_queue_never_holds_more_than_a_handful(redis_url: str, tmp_path: Path) -> None:
    app = make_app(Settings(data_dir=tmp_path, model="tiny", redis_url=redis_url))
    wake_ups = WakeUps(app)
    with redis.Redis.from_url(redis_url) as client:
        for count in range(1, ENOUGH_IN_REDIS + 1):
            wake_ups.wake("tiny")
            wait_until(
                lambda expected=count: client.llen(work_queue("tiny")) == expected, f"{count} wake-ups"
            )
        for _ in range(200):
            wake_ups.wake("tiny", 1000)
        wake_ups.close()
        assert client.llen(work_queue("tiny")) == ENOUGH_IN_REDIS
        client.flushdb()
    app.close()


def test_who_says_it_again_and_again_is_heard_at_once_and_then_now_and_then(
    redis_url: str, tmp_path: Path
) -> None:
    app = make_app(Settings(data_dir=tmp_path, model="tiny", redis_url=redis_url))
    wake_ups = WakeUps(app)
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
    app.close()


def test_what_is_said_right_after_another_is_heard_a_moment_later(redis_url: str, tmp_path: Path) -> None:
    app = make_app(Settings(data_dir=tmp_path, model="tiny", redis_url=redis_url))
    wake_ups = WakeUps(app)
    with redis.Redis.from_url(redis_url) as client:
        heard: list[float] = []

        def hear(model: str) -> bool:
            if client.lpop(work_queue(model)):
                heard.append(time.monotonic())
                return True
            return False

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
    app.close()


def test_a_dead_redis_is_only_a_line_in_the_log(tmp_path: Path) -> None:
    app = make_app(Settings(data_dir=tmp_path, model="tiny", redis_url=f"unix://{tmp_path}/nobody.sock"))
    wake_ups = WakeUps(app)
    wake_ups.wake("tiny")
    wake_ups.close()
    app.close()
