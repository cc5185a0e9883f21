"""EnginePool: what Celery takes for its worker pool.

Owns the bridge between Celery's event loop (the hub, in the main thread) and our threads. A message holds no
slot: `nightpress.work` only wakes the claimer; `nightpress.generate` is put into SQL and acked after that
commit, so that at any moment SQL or Redis has it, and from then on it waits its turn in SQL like any other job.
Celery's tracer, retries and time limits are not used. Acks must happen on the hub's thread and inside one of
its events, hence the eventfd (kombu defers acks made elsewhere to the next event).

Source: Celery's user guide on custom pools; `celery.concurrency.base.BasePool` of 5.7.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from celery.concurrency.base import BasePool
from celery.worker import state as celery_state
from celery.worker.control import Panel, control_command
from celery.worker.control import revoke as celery_revoke
from celery.worker.request import Request
from kombu.serialization import loads

from jobs.arrivals import Arrival
from jobs.broker import GENERATE, WORK
from jobs.worker import Worker

log = logging.getLogger(__name__)

EXIT_HOPELESS = 70  # EX_SOFTWARE of sysexits.h


class PlainRequest(Request):  # type: ignore[misc]
    """What Celery makes of a message, without the time limits and the other name that its sender may wish for: nobody
    keeps them here, and what is wrong with them would come out when the message is already on Celery's books."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.time_limits = (None, None)
        self.name = self.type


class EnginePool(BasePool):  # type: ignore[misc]
    """One per worker process; starts and drains the `Worker`."""

    signal_safe = False
    body_can_be_buffer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.worker = Worker(
            self.app.settings,
            self.app,
            on_hopeless=self._give_up,
            is_revoked=lambda task_id: task_id in celery_state.revoked,
        )
        self._committed: deque[Callable[[], None]] = deque()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # --- Celery calls these in the main thread ----------------------------------------------------------------

    def on_start(self) -> None:
        self.worker.start()

    def register_with_event_loop(self, hub: Any) -> None:
        hub.add_reader(self._eventfd, self._run_committed)  # again after every reconnect

    def on_apply(
        self,
        target: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        **_: Any,
    ) -> None:
        name, task_id, _request, body, content_type, encoding = args

        def accept() -> None:
            try:
                if accept_callback:
                    accept_callback(os.getpid(), time.monotonic())  # acks
            finally:
                if callback:
                    callback((0, None, 0.0))  # frees the reservation

        try:
            task_args, task_kwargs, _embed = loads(body, content_type, encoding, accept={"application/json"})
        except Exception as error:  # an exception that leaves here would end the consumer
            log.warning("pool.undecodable task=%s error=%s", name, type(error).__name__)
            task_args, task_kwargs = ["undecodable"], {}
        if name == GENERATE:
            self.worker.arrivals.put(Arrival(task_id, task_args, task_kwargs, lambda: self._post(accept)))
            return
        if name == WORK:
            self.worker.wake()
        else:
            log.warning("pool.unknown task=%s", name)
        accept()

    def on_stop(self) -> None:
        self.worker.drain(self.app.settings.grace_seconds)
        self._close()

    def on_terminate(self) -> None:
        self.worker.drain(0.0)
        self._close()

    @property
    def num_processes(self) -> int:
        return int(self.limit)

    # --- between threads ----------------------------------------------------------------------------------------

    def _post(self, accept: Callable[[], None]) -> None:
        self._committed.append(accept)
        os.eventfd_write(self._eventfd, 1)

    def _run_committed(self) -> None:
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            pass
        while self._committed:
            try:
                self._committed.popleft()()
            except Exception:
                # A connection that is lost takes its acks with it: the message comes again and finds its row.
                log.warning("pool.ack_failed", exc_info=True)

    def _give_up(self, reason: str) -> None:
        log.critical("worker.hopeless reason=%s", reason)
        celery_state.should_stop = EXIT_HOPELESS  # the hub looks at it at its next event

    def _close(self) -> None:
        if self._eventfd >= 0:
            os.close(self._eventfd)
            self._eventfd = -1


@control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")  # type: ignore[untyped-decorator]
def revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **kwargs: Any) -> Any:
    """Celery's own command, which forgets messages that still wait in Redis, and a cancel in SQL.

    A plain revoke ends only what has not started; `terminate=True` also what runs, on whichever worker.
    """
    answer = celery_revoke(state, task_id, terminate=False, **kwargs)
    ids = [task_id] if isinstance(task_id, str) else list(task_id or [])
    state.consumer.pool.worker.cancel(ids, running=bool(terminate))
    return answer


assert Panel.data["revoke"] is revoke
