"""Wake-ups: a handful in Redis, however many jobs there are, and a dead Redis harms nobody."""

from __future__ import annotations

from pathlib import Path

import redis

from jobs.broker import make_app, work_queue
from jobs.settings import Settings
from jobs.wakeups import ENOUGH_IN_REDIS, WakeUps
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


def test_a_dead_redis_is_only_a_line_in_the_log(tmp_path: Path) -> None:
    app = make_app(Settings(data_dir=tmp_path, model="tiny", redis_url=f"unix://{tmp_path}/nobody.sock"))
    wake_ups = WakeUps(app)
    wake_ups.wake("tiny")
    wake_ups.close()
    app.close()
