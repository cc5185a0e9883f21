"""WakeUps: tells workers through Redis that a model has queued jobs.

Owns one small thread, so that a slow or dead Redis never holds up a submit. Coalesced twice: a model that is
already waiting to be announced, if only because it was a moment ago, is not queued again, and a queue that holds a
handful of wake-ups gets no more. A lost wake-up costs one sweep, nothing else.
"""

from __future__ import annotations

import logging
import threading
import time

from redis import Redis

from jobs.broker import SOCKET_SECONDS, WORK, NightpressCelery, work_queue

log = logging.getLogger(__name__)

ENOUGH_IN_REDIS = 4
# Between two announcements of one model: each costs this process and a worker about as much as a submit. One that has
# to wait goes out when this time is over.
APART_SECONDS = 0.02
REPEAT_SECONDS = 0.2  # between two announcements by somebody who has more to announce all the time


class WakeUps:
    """`wake` may be called from any thread and never blocks or raises."""

    def __init__(self, app: NightpressCelery) -> None:
        self.app = app
        self._redis = Redis.from_url(
            app.settings.redis, socket_timeout=SOCKET_SECONDS, socket_connect_timeout=SOCKET_SECONDS
        )
        self._turn = threading.Condition()
        self._models: set[str] = set()
        self._repeats: set[str] = set()
        self._quiet_until: dict[str, float] = {}  # of models that were announced just now
        self._no_repeat_until: dict[str, float] = {}
        self._stopping = False
        self._failing = False
        self._thread: threading.Thread | None = None

    def wake(self, model: str, num_jobs: int = 1) -> None:
        """Announce work for `model`; `num_jobs` does not matter, one message wakes a worker for all."""
        self._announce(self._models, model)

    def repeat(self, model: str) -> None:
        """The same, from somebody who says so again and again: not within `REPEAT_SECONDS` of the last time."""
        self._announce(self._repeats, model)

    def _announce(self, models: set[str], model: str) -> None:
        with self._turn:
            if self._stopping:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="wake-ups", daemon=True)
                self._thread.start()
            models.add(model)
            self._turn.notify()

    def _next(self) -> str | None:
        """The model to announce now, once there is one; None: no more."""
        with self._turn:
            while True:
                moment = time.monotonic()
                due_at = {one: self._no_repeat_until.get(one, 0.0) for one in self._repeats}
                due_at |= {one: self._quiet_until.get(one, 0.0) for one in self._models}
                if ready := sorted(one for one, at in due_at.items() if at <= moment or self._stopping):
                    model = ready[0]
                    # Clients choose names: those whose time is over must not stay.
                    self._quiet_until = {one: at for one, at in self._quiet_until.items() if at > moment}
                    self._quiet_until[model] = moment + APART_SECONDS
                    if model in self._repeats:
                        self._no_repeat_until[model] = moment + REPEAT_SECONDS
                    self._models.discard(model)
                    self._repeats.discard(model)
                    return model
                if self._stopping:
                    return None
                self._turn.wait(min(due_at.values()) - moment if due_at else None)

    def _run(self) -> None:
        while (model := self._next()) is not None:
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
