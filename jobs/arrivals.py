"""Arrivals: jobs that come as Celery messages, on their way into SQL.

Owns the thread that commits `nightpress.generate` messages in small groups. A message is reported as
committed only when its row is there (or was there before: a duplicate is no error), and only then does the
pool ack it. While the database is away the messages stay unacked, and so in Redis's care.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from jobs.admission import Refusal
from jobs.bad_field import BadField
from jobs.body import parse_job
from jobs.celery_results import CeleryResults
from jobs.database import Database, cause
from jobs.intake import Intake, TaskMessage, check_task_id
from jobs.models import Job
from jobs.quotas import QuotaExceeded
from jobs.settings import Settings
from jobs.states import TERMINAL
from jobs.tenants import DEFAULT, check_tenant
from jobs.terms_body import split_terms

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.005
GATHER_MESSAGES = 256
RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message: `args` must be empty, `kwargs` is the body of one job and, if the sender likes, `tenant`:
    whoever can write to Redis is trusted to say for whom. `committed()` is called once."""

    task_id: str
    args: list[Any]
    kwargs: dict[str, Any]
    committed: Callable[[], None]


class Arrivals(threading.Thread):
    def __init__(
        self,
        database: Database,
        settings: Settings,
        results: CeleryResults,
        *,
        on_jobs: Callable[[set[str]], None],
        is_revoked: Callable[[str], bool],
        cancel: Callable[[str], None],
    ) -> None:
        super().__init__(name="arrivals", daemon=True)
        self.database = database
        self.settings = settings
        self.intake = Intake(database, settings)
        self.results = results
        self.on_jobs = on_jobs  # told the models that have new work
        self.is_revoked = is_revoked  # by a command that came while the message was on its way
        self.cancel = cancel
        self._inbox: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._stopping = False

    def put(self, arrival: Arrival) -> None:
        self._inbox.put(arrival)

    def stop(self, timeout: float) -> None:
        """Commit what has come, within `timeout` seconds; the rest goes back to Redis unacked."""
        self._stopping = True
        self._inbox.put(None)
        if self.is_alive():
            self.join(timeout)

    def run(self) -> None:
        last = False
        while not last:
            group, last = self._gather()
            if group:
                self._settle(group)

    def _settle(self, group: list[Arrival]) -> None:
        """Commit `group`, however long the database is away; a message that it refuses harms only itself."""
        settle = self._accept
        while True:
            try:
                return settle(group)
            except Exception as error:
                log.error("arrivals.failed messages=%d error=%s", len(group), cause(error))
                if isinstance(error, SQLAlchemyError) and not isinstance(error, DataError | IntegrityError):
                    if self._stopping:
                        return None  # unacked, and so in Redis's care
                    time.sleep(RETRY_SECONDS)
                elif len(group) > 1:
                    for arrival in group:
                        self._settle([arrival])
                    return None
                elif settle == self._turn_away:
                    return None  # not even that
                else:
                    settle = self._turn_away

    def _turn_away(self, group: list[Arrival]) -> None:
        for arrival in group:
            self._refuse(
                arrival.task_id, BadField(None, "the job could not be stored", "unstorable_job"), DEFAULT
            )
            arrival.committed()

    def _gather(self) -> tuple[list[Arrival], bool]:
        group: list[Arrival] = []
        deadline = float("inf")
        while len(group) < GATHER_MESSAGES:
            try:
                arrival = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()) if group else None)
            except queue.Empty:
                break
            if arrival is None:
                return group, True
            if not group:
                deadline = time.monotonic() + GATHER_SECONDS
            group.append(arrival)
        return group, False

    def _accept(self, group: list[Arrival]) -> None:
        good: list[TaskMessage] = []
        clock = cache(self.intake.clock)  # asked once for all of them, if at all
        for arrival in group:
            if isinstance(parsed := self._parse(arrival, clock), TaskMessage):
                good.append(parsed)
            else:
                self._refuse(arrival.task_id, parsed, DEFAULT)
        if good:
            refused = self.intake.accept_messages(good)
            for message in good:
                if (error := refused.get(message.task_id)) is not None:
                    # A tenant that does not exist has nothing; whoever runs the service hears of it.
                    tenant = message.tenant if isinstance(error, QuotaExceeded) else DEFAULT
                    self._refuse(message.task_id, error, tenant)
            good = [message for message in good if message.task_id not in refused]
            self._tell_started([message.task_id for message in good])
            for message in good:
                if self.is_revoked(message.task_id):
                    self.cancel(message.task_id)
        for arrival in group:
            arrival.committed()
        if good:
            self.on_jobs({message.body.model for message in good if message.body.model})

    def _parse(self, arrival: Arrival, clock: Callable[[], float]) -> TaskMessage | BadField:
        try:
            check_task_id(arrival.task_id)
            if arrival.args:
                raise BadField("args", "give the job as keyword arguments only")
            named = arrival.kwargs.get("tenant")
            tenant = DEFAULT if named is None else check_tenant(named)
            job = {name: value for name, value in arrival.kwargs.items() if name != "tenant"}
            terms, job = split_terms(job, clock=clock)
            (body,) = self.intake.name_models([parse_job(job, self.settings)])
            return TaskMessage(arrival.task_id, body, tenant, terms)
        except BadField as error:
            return error

    def _refuse(self, task_id: str, error: Refusal, tenant: str) -> None:
        # A field's name is the sender's own: it stays one line, and short.
        log.warning("arrivals.refused param=%.80a code=%s", error.param, error.code)
        try:
            if not self.intake.accept_invalid(task_id, error.as_error(), tenant):
                return  # delivered again: what became of it the first time stands, and is told by whoever ends it
        except BadField:
            pass  # not even its id can be stored: the sender still hears of it
        self.results.failed(task_id, error.as_error())

    def _tell_started(self, ids: list[str]) -> None:
        # A duplicate of a job that has ended must not look started again.
        with self.database.read() as connection:
            rows = connection.execute(select(Job.id, Job.state).where(Job.id.in_(ids)))
            open_ids = {row.id for row in rows if row.state not in TERMINAL}
        for task_id in ids:
            if task_id in open_ids:
                self.results.started(task_id)
