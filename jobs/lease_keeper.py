"""LeaseKeeper: the thread that renews the lease, hears of cancels and compares memory with SQL.

Owns the rule for disagreement. What SQL has in our name and memory does not (a claim whose commit was unknown)
is handed back; what memory has and SQL does not (taken back by a sweeper) is aborted. Both only when renewals see it
for a while, because claims and outcomes are always on their way between the two, and a poke makes the next one follow
at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from engine.request import RequestId
from jobs.database import Database, cause
from jobs.holdings import Holding, Holdings
from jobs.leases import Renewal, renew
from jobs.outcomes import Outcome

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
SETTLE_SECONDS = 0.5  # for a claim or an outcome to be known on both sides
STOP_SECONDS = 10.0


class LeaseKeeper(threading.Thread):
    """`end(holding)` aborts one job wherever it is; `report()` gives the columns shown in the workers table."""

    def __init__(
        self,
        database: Database,
        holdings: Holdings,
        *,
        worker_id: Callable[[], str],
        lease_seconds: float,
        renew_seconds: float,
        report: Callable[[], dict[str, Any]],
        end: Callable[[Holding], None],
        finish: Callable[[Outcome], None],
        on_lost: Callable[[], None],
        on_renewed: Callable[[], None],
    ) -> None:
        super().__init__(name="lease-keeper", daemon=True)
        self.database = database
        self.holdings = holdings
        self.worker_id = worker_id
        self.lease_seconds = lease_seconds
        self.renew_seconds = renew_seconds
        self.report = report
        self.end = end
        self.finish = finish
        self.on_lost = on_lost
        self.on_renewed = on_renewed
        self._poke = threading.Event()
        self._stopping = False
        self._only_in_sql = _Doubts()
        self._only_in_memory = _Doubts()

    def poke(self) -> None:
        """Renew now, for a cancel that should not wait."""
        self._poke.set()

    def stop(self) -> None:
        self._stopping = True
        self._poke.set()
        if self.is_alive():
            self.join(STOP_SECONDS)

    def run(self) -> None:
        wait = 0.0
        while True:
            self._poke.wait(wait)
            self._poke.clear()
            if self._stopping:
                return
            wait = self.renew_seconds
            try:
                self._renew()
            except SQLAlchemyError as error:
                log.error("lease.database error=%s", cause(error))
                wait = RETRY_SECONDS
            except Exception:
                log.exception("lease.failed")

    def _renew(self) -> None:
        worker_id = self.worker_id()
        report = self.report()
        renewal = self.database.transact(
            lambda connection: renew(
                connection, worker_id=worker_id, lease_seconds=self.lease_seconds, report=report
            ),
            patience=self.lease_seconds / 3,
        )
        if renewal is None:
            log.error("lease.lost worker=%s held=%d", worker_id, len(self.holdings))
            self._only_in_sql, self._only_in_memory = _Doubts(), _Doubts()
            self.on_lost()
            return
        self._reconcile(renewal)
        self.on_renewed()

    def _reconcile(self, renewal: Renewal) -> None:
        memory = {holding.id: holding for holding in self.holdings.all()}
        sql = {RequestId(*key): cancelling for key, cancelling in renewal.held.items()}
        for request_id, cancelling in sql.items():
            if cancelling and (holding := memory.get(request_id)):
                self.end(holding)
        for request_id in self._only_in_sql.look(sql.keys() - memory.keys()):
            log.warning("lease.orphan job=%s fence=%d", *request_id)
            self.finish(Outcome(job_id=request_id.job_id, fence=request_id.fence, kind="released"))
        for request_id in self._only_in_memory.look(memory.keys() - sql.keys()):
            log.warning("lease.taken_back job=%s fence=%d", *request_id)
            self.end(memory[request_id])


class _Doubts:
    """What one side lacks, and since when that is seen."""

    def __init__(self) -> None:
        self._since: dict[RequestId, float] = {}

    def look(self, lacking: Iterable[RequestId]) -> list[RequestId]:
        """Those that are still lacking, and have been for a while."""
        before, now = self._since, time.monotonic()
        self._since = {request_id: before.get(request_id, now) for request_id in lacking}
        return [name for name in self._since if name in before and now - before[name] >= SETTLE_SECONDS]
