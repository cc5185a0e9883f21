"""WakeUps: tells workers through Redis that a model has queued jobs.

Owns one small thread, so that a slow or dead Redis never holds up a submit. Who was first is told first, and each
costs the same however many wait. Only models that live workers serve are announced: clients make names up, and what
nobody takes out of Redis would stay there. Coalesced twice: a model that is already waiting to be announced, if only
because it was a moment ago, is not queued again, and a queue that holds a handful of wake-ups gets no more. A lost
wake-up costs one sweep, nothing else.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from dataclasses import dataclass

from redis import Redis

from jobs.broker import SOCKET_SECONDS, WORK, NightpressCelery, work_queue
from jobs.database import Database
from jobs.leases import served_models

log = logging.getLogger(__name__)

ENOUGH_IN_REDIS = 4
# Between two announcements of one model: each costs this process and a worker about as much as a submit. One that has
# to wait goes out when this time is over.
APART_SECONDS = 0.02
REPEAT_SECONDS = 0.2  # between two announcements by somebody who has more to announce all the time
SERVED_SECONDS = 5.0  # so long a model that was served counts as served


@dataclass(slots=True)
class _Waiting:
    due_at: float
    said_at: float  # the last time: its jobs were in SQL by then
    is_repeat: bool


class WakeUps:
    """`wake` may be called from any thread and never blocks or raises."""

    def __init__(self, app: NightpressCelery, database: Database) -> None:
        self.app = app
        self.database = database
        self._redis = Redis.from_url(
            app.settings.redis, socket_timeout=SOCKET_SECONDS, socket_connect_timeout=SOCKET_SECONDS
        )
        self._turn = threading.Condition()
        self._waiting: dict[str, _Waiting] = {}  # by model
        # By due time, then as they came; an entry whose time is not that of its model any more is passed over.
        self._order: list[tuple[float, int, str]] = []
        self._serial = itertools.count()
        self._quiet_until: dict[str, float] = {}  # of models that were announced just now, the oldest first
        self._no_repeat_until: dict[str, float] = {}
        self._served: frozenset[str] = frozenset()
        self._served_at = float("-inf")  # when SQL was asked
        self._stopping = False
        self._failing = False
        self._thread: threading.Thread | None = None

    def wake(self, model: str) -> None:
        """Announce work for `model`; one message wakes a worker for all of it."""
        self._announce(model, self._quiet_until, is_repeat=False)

    def repeat(self, model: str) -> None:
        """The same, from somebody who says so again and again: not within `REPEAT_SECONDS` of the last time."""
        self._announce(model, self._no_repeat_until, is_repeat=True)

    def _announce(self, model: str, not_until: dict[str, float], *, is_repeat: bool) -> None:
        with self._turn:
            if self._stopping:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="wake-ups", daemon=True)
                self._thread.start()
            moment = time.monotonic()
            due_at = max(not_until.get(model, 0.0), moment)
            waiting = self._waiting.get(model)
            if waiting is None or due_at < waiting.due_at:
                is_repeat |= waiting is not None and waiting.is_repeat
                self._waiting[model] = _Waiting(due_at, moment, is_repeat)
                heapq.heappush(self._order, (due_at, next(self._serial), model))
                self._turn.notify()
            else:
                waiting.said_at = moment
                waiting.is_repeat |= is_repeat

    def _next(self) -> tuple[str, float] | None:
        """The model to announce now, once there is one, and when it was said last; None: no more."""
        with self._turn:
            while True:
                while self._order and not self._is_due_then(*self._order[0]):
                    heapq.heappop(self._order)
                moment = time.monotonic()
                if self._order and (self._order[0][0] <= moment or self._stopping):
                    _, _, model = heapq.heappop(self._order)
                    return model, self._taken(model, moment).said_at
                if self._stopping:
                    return None
                self._turn.wait(self._order[0][0] - moment if self._order else None)

    def _is_due_then(self, due_at: float, _: int, model: str) -> bool:
        return model in self._waiting and self._waiting[model].due_at == due_at

    def _taken(self, model: str, moment: float) -> _Waiting:
        waiting = self._waiting.pop(model)
        # Clients choose names: those whose time is over must not stay.
        while self._quiet_until and next(iter(self._quiet_until.values())) <= moment:
            del self._quiet_until[next(iter(self._quiet_until))]
        self._quiet_until.pop(model, None)
        self._quiet_until[model] = moment + APART_SECONDS
        if waiting.is_repeat:
            self._no_repeat_until[model] = moment + REPEAT_SECONDS
        return waiting

    def _run(self) -> None:
        while (one := self._next()) is not None:
            model, said_at = one
            try:
                if self._is_served(model, said_at):
                    self._publish(model)
                    self._failing = False
            except Exception as error:  # of redis, kombu or SQL: the sweeper announces it again
                if not self._failing:  # said once, not for every job until Redis is back
                    log.warning("wake_up.failed model=%.80a error=%s", model, type(error).__name__)
                self._failing = True

    def _is_served(self, model: str, said_at: float) -> bool:
        """No only if SQL was asked after the work was there: a worker that came later has looked by itself."""
        oldest = time.monotonic() - SERVED_SECONDS if model in self._served else said_at
        if self._served_at <= oldest:
            asked_at = time.monotonic()
            with self.database.read() as connection:
                self._served = served_models(connection)
            self._served_at = asked_at
        return model in self._served

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
