"""WakeUps: tells workers through Redis that a model has queued jobs.

Owns one small thread, so that a slow or dead Redis never holds up a submit. Coalesced twice: a model that is
already waiting to be announced is not queued again, and a queue that holds a handful of wake-ups gets no more.
A lost wake-up costs one sweep, nothing else.
"""

from __future__ import annotations

import logging
import threading

from redis import Redis

from jobs.broker import SOCKET_SECONDS, WORK, NightpressCelery, work_queue

log = logging.getLogger(__name__)

ENOUGH_IN_REDIS = 4


class WakeUps:
    """`wake` may be called from any thread and never blocks or raises."""

    def __init__(self, app: NightpressCelery) -> None:
        self.app = app
        self._redis = Redis.from_url(
            app.settings.redis, socket_timeout=SOCKET_SECONDS, socket_connect_timeout=SOCKET_SECONDS
        )
        self._turn = threading.Condition()
        self._models: set[str] = set()
        self._stopping = False
        self._failing = False
        self._thread: threading.Thread | None = None

    def wake(self, model: str, num_jobs: int = 1) -> None:
        """Announce work for `model`; `num_jobs` does not matter, one message wakes a worker for all."""
        with self._turn:
            if self._stopping:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="wake-ups", daemon=True)
                self._thread.start()
            self._models.add(model)
            self._turn.notify()

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._models or self._stopping)
                if not self._models:
                    return
                model = self._models.pop()
            try:
                self._publish(model)
                self._failing = False
            except Exception as error:  # of redis or kombu: the sweeper announces it again
                if not self._failing:  # said once, not for every job until Redis is back
                    log.warning("wake_up.failed model=%s error=%s", model, type(error).__name__)
                self._failing = True

    def _publish(self, model: str) -> None:
        queue = work_queue(model)
        if self._redis.llen(queue) < ENOUGH_IN_REDIS:
            self.app.send_task(WORK, kwargs={"model": model}, queue=queue, ignore_result=True, retry=False)

    def close(self) -> None:
        """Send what is pending, then let go of Redis."""
        with self._turn:
            self._stopping = True
            self._turn.notify()
        if self._thread is not None:
            self._thread.join(SOCKET_SECONDS)
        self._redis.close()
