"""QueueDepth: how many tokens are ahead in each model's queue, as of a moment ago.

Owns one picture of all queues and when it is taken anew. To be exact for every reader, a million queued rows would
have to be summed for each; instead one sum per model, tier and fair tag is kept for a second, or for twenty times
as long as it took to make, whichever is more. So at most a twentieth of one connection goes into it, a short queue
is seen live, and a picture of a long one is old by a small part of what the queue takes. A picture that took long
is renewed beside the readers, who keep the old one meanwhile, unless nobody asked for as long again: then they wait,
or the first who asks in the evening would be told of the morning. Tokens are estimated ones, as at submit, and no
more of a sample than its model's context (`jobs.counted_tokens`).
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import SQLAlchemyError

from jobs.conditions import JOB_QUEUED
from jobs.counted_tokens import counted_column, longest_contexts
from jobs.database import Database, cause
from jobs.dialects import clock
from jobs.models import Job, Worker
from jobs.pace import Figures, figures_of
from jobs.states import HELD, WorkerState
from jobs.terms import DELAYED

log = logging.getLogger(__name__)

FRESH_SECONDS: Final = 1.0
COST_FACTOR: Final = 20.0
SLOW_SECONDS: Final = 0.05  # a picture that took longer is renewed beside its readers
MUCH: Final = 0.05  # of what was queued
TAKING = (WorkerState.STARTING, WorkerState.READY)  # workers that will take more jobs


@dataclass(slots=True)
class Queue:
    """Of one model. `places` in order of work, each a (tier, fair tag), and `tokens` up to and with each."""

    places: list[tuple[int, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_held: int = 0  # samples of jobs that workers have
    held_tokens: int = 0
    num_running: int = 0  # sequences that their engines compute
    workers: list[Figures] = field(default_factory=list)  # live ones that take jobs

    @property
    def tokens_queued(self) -> int:
        return self.tokens[-1] if self.tokens else 0

    def ahead(self, tier: int, fair_tag: float = float("inf")) -> int:
        """Tokens queued up to this place, with all that share it."""
        index = bisect_right(self.places, (tier, fair_tag))
        return self.tokens[index - 1] if index else 0


@dataclass(frozen=True, slots=True)
class Picture:
    at: float  # unix seconds of the database's clock
    queues: dict[str, Queue]  # by model
    contexts: dict[str, int]  # `counted_tokens.longest_contexts`


class QueueDepth:
    """Safe from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()  # whoever holds it takes the picture
        self._picture: Picture | None = None
        self._num_changes = 0
        self._cost = 0.0  # seconds
        self._until = 0.0  # monotonic

    def picture(self, connection: Connection | None = None) -> Picture:
        """`connection`: of a transaction that is open already, to read through. Raises `SQLAlchemyError`."""
        known = self._picture
        if known is not None and time.monotonic() < self._until:
            return known
        if known is not None and self._cost >= SLOW_SECONDS and time.monotonic() < self._until + self._life:
            if self._lock.acquire(blocking=False):
                threading.Thread(target=self._renew_beside, name="queue-depth", daemon=True).start()
            return known
        # A connection first, then the lock: whoever holds the lock waits for no connection, so nobody waits for ever.
        with self._database.read() if connection is None else nullcontext(connection) as reader, self._lock:
            known = self._picture
            if known is not None and time.monotonic() < self._until:  # another reader has just taken it
                return known
            return self._renew(reader)

    @property
    def _life(self) -> float:
        """Seconds."""
        return max(FRESH_SECONDS, COST_FACTOR * self._cost)

    @property
    def contexts(self) -> Mapping[str, int]:
        """As the last picture has them."""
        return {} if (known := self._picture) is None else known.contexts

    def changed(self, model: str, tokens: int) -> None:
        """So many were queued here just now. If that is much, the next reader waits for a new picture."""
        known = self._picture
        queue = known.queues.get(model) if known is not None else None
        if queue is None or tokens > MUCH * queue.tokens_queued:
            self._num_changes += 1
            self._picture = None

    def _renew_beside(self) -> None:
        try:
            with self._database.read() as connection:
                self._renew(connection)
        except SQLAlchemyError as error:
            log.warning("queue_depth.database error=%s", cause(error))
        finally:
            self._lock.release()

    def _renew(self, connection: Connection) -> Picture:
        changes, begun = self._num_changes, time.monotonic()
        picture = look(connection)
        self._cost = time.monotonic() - begun
        self._until = time.monotonic() + self._life
        if changes == self._num_changes:
            self._picture = picture
        return picture


def look(connection: Connection) -> Picture:
    """All queues now; reads every queued row."""
    queues: dict[str, Queue] = {}
    at, contexts = clock(connection), longest_contexts(connection)
    tokens_ahead = func.sum(counted_column(contexts))
    order = (Job.model, Job.tier, Job.fair_tag)
    sums = select(*order, tokens_ahead).where(JOB_QUEUED, Job.tier < DELAYED).group_by(*order)
    for model, tier, fair_tag, tokens in connection.execute(sums.order_by(*order)):
        queue = queues.setdefault(model, Queue())
        queue.places.append((tier, fair_tag))
        queue.tokens.append(int(tokens) + queue.tokens_queued)
    held = (
        select(Job.model, func.sum(Job.num_samples), tokens_ahead)
        .where(Job.worker_id.is_not(None), Job.state.in_(sorted(HELD)))
        .group_by(Job.model)
    )
    for model, num_samples, tokens in connection.execute(held):
        queue = queues.setdefault(model, Queue())
        queue.num_held, queue.held_tokens = int(num_samples), int(tokens)
    live = select(Worker.model, Worker.num_running, Worker.pace).where(
        Worker.state.in_(sorted(TAKING)), Worker.lease_until > at
    )
    for model, num_running, pace in connection.execute(live):
        queue = queues.setdefault(model, Queue())
        queue.num_running += num_running
        queue.workers.append(figures_of(pace))
    return Picture(at, queues, contexts)
