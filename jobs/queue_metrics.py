"""Queue metrics: how much waits, runs and is alive, as SQL says, for Prometheus.

Owns three small queries and their cache. They are asked at scrape, but the answer is kept for some seconds, longer
the longer the database took, so that scraping, however often, takes a twentieth of its time at most. The label
`model` is bounded: a model that no worker has ever served is counted as `other`, for clients may name what they like.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Final

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import SQLAlchemyError

from jobs.conditions import JOB_QUEUED
from jobs.database import Database
from jobs.dialects import now
from jobs.exposition import Collector, Metric, gauge
from jobs.models import Job, Worker
from jobs.states import HELD, LIVE_WORKER, WorkerState
from jobs.terms import Tier, tier_of

CACHE_SECONDS: Final = 5.0
_SHARE: Final = 20  # an answer is kept so many times as long as it took
OTHER: Final = "other"


class QueueMetrics(Collector):
    """Safe from any thread; one of them asks, the others wait for it. Without a database there is one gauge, that
    says so."""

    def __init__(self, database: Database, served_model: str = "") -> None:
        self._database = database
        self._served_model = served_model
        self._lock = threading.Lock()
        self._families: list[Metric] = []
        self._until = 0.0  # on the monotonic clock

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            asked = time.monotonic()
            if asked >= self._until:
                self._families = self._ask()
                took = time.monotonic() - asked
                self._until = asked + took + max(CACHE_SECONDS, _SHARE * took)
            return list(self._families)

    def _ask(self) -> list[Metric]:
        up = gauge("nightpress_database_up", "1 while the database answers.")
        try:
            with self._database.read() as connection:
                families = self._families_of(connection)
        except SQLAlchemyError:
            up.add_metric([], 0.0)
            return [up]
        up.add_metric([], 1.0)
        return [up, *families]

    def _families_of(self, connection: Connection) -> list[Metric]:
        served = {self._served_model, *connection.scalars(select(Worker.model).distinct())} - {""}
        queued: dict[tuple[str, str], int] = {}
        for model in sorted(served):  # zeros too, so that an alert sees a queue that is empty
            queued |= {(model, tier.name.lower()): 0 for tier in Tier}
        for row in connection.execute(
            select(Job.model, Job.tier, func.count().label("jobs"))
            .where(JOB_QUEUED)
            .group_by(Job.model, Job.tier)
        ):
            key = (row.model if row.model in served else OTHER, tier_of(row.tier).name.lower())
            queued[key] = queued.get(key, 0) + row.jobs
        depth = gauge("nightpress_queue_depth", "Jobs that wait for a worker.", ["model", "tier"])
        for labels, count in queued.items():
            depth.add_metric(labels, count)

        held = gauge("nightpress_jobs_running", "Jobs in a worker's name.", ["model"])
        for model, count in connection.execute(
            select(Job.model, func.count())
            .where(Job.worker_id.is_not(None), Job.state.in_(sorted(HELD)))
            .group_by(Job.model)
        ):
            held.add_metric([model], count)  # a worker holds it, so its model is served

        workers = gauge("nightpress_workers", "Workers with a lease, by state.", ["model", "state"])
        speed = gauge("nightpress_tokens_per_second", "Tokens that workers generate now.", ["model"])
        counts = {(model, str(state)): 0 for model in sorted(served) for state in sorted(LIVE_WORKER)}
        speeds = dict.fromkeys(sorted(served), 0.0)
        for worker in connection.execute(
            select(Worker.model, Worker.state, Worker.tokens_per_second).where(
                Worker.state.in_(sorted(LIVE_WORKER)), Worker.lease_until > now()
            )
        ):
            key = (worker.model, str(WorkerState(worker.state)))
            counts[key] = counts.get(key, 0) + 1  # it may have come since the first query
            speeds[worker.model] = speeds.get(worker.model, 0.0) + worker.tokens_per_second
        for labels, count in counts.items():
            workers.add_metric(labels, count)
        for model, value in speeds.items():
            speed.add_metric([model], value)
        return [depth, held, workers, speed]
