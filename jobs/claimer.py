"""Claimer: the thread that takes jobs from SQL whenever the engine has room, and turns them into requests.

Owns two decisions: how many to claim (a window of a few times what the engine runs at once, so that it can
plan, in groups, so that the first prompt is computed while the next is still being encoded), and what to do with
a job that several engine deaths have met: it runs alone, so that a further death convicts it and nobody else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from engine.request import Request, RequestId
from jobs.claims import Claim, claim
from jobs.database import Database
from jobs.engine_process import EngineGoneError, NoCreditError
from jobs.holdings import Holding, Holdings
from jobs.outcomes import Outcome
from jobs.supervisor import EngineSupervisor

log = logging.getLogger(__name__)

CLAIM_GROUP = 64
RETRY_SECONDS = 1.0
STOP_SECONDS = 10.0


class Claimer(threading.Thread):
    """`window` is the most jobs held at once; `encode` makes a request of a claim or raises, then that job fails."""

    def __init__(
        self,
        database: Database,
        holdings: Holdings,
        supervisor: EngineSupervisor,
        *,
        model: str,
        worker_id: Callable[[], str],
        encode: Callable[[Claim], Request],
        finish: Callable[[Outcome], None],
        on_more: Callable[[], None],
        window: int,
        low_water: int,
        max_crashes: int,
    ) -> None:
        super().__init__(name="claimer", daemon=True)
        self.database = database
        self.holdings = holdings
        self.supervisor = supervisor
        self.model = model
        self.worker_id = worker_id
        self.encode = encode
        self.finish = finish
        self.on_more = on_more  # SQL holds more than fits in here: others may have it
        self.window = window
        self.low_water = low_water  # claim again when so many are left
        self.max_crashes = max_crashes
        self._suspects: deque[Holding] = deque()
        self._alone: RequestId | None = None  # the suspect that has the engine to itself
        self._more = True  # whether SQL may hold more for us than the last claim brought
        self._wake = threading.Event()
        self._stopping = False

    def wake(self) -> None:
        """There may be work (a message, a sweep): look."""
        self._more = True
        self._wake.set()

    def on_room(self) -> None:
        """A job left: go on only if there was more to claim, so that an empty queue is not asked again and again."""
        if self._suspects or self._alone or (self._more and len(self.holdings) <= self.low_water):
            self._wake.set()

    def stop(self) -> None:
        """Claim nothing more; what is claimed but not sent stays in the holdings."""
        self._stopping = True
        self._wake.set()
        if self.is_alive():
            self.join(STOP_SECONDS)

    def run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            try:
                self._fill()
            except SQLAlchemyError as error:
                log.error("claimer.database error=%s", type(error).__name__)
                self._try_later()
            except Exception:
                log.exception("claimer.failed")
                self._try_later()

    def _try_later(self) -> None:
        if not self._stopping:
            time.sleep(RETRY_SECONDS)
        self.wake()

    def _fill(self) -> None:
        claimed = False
        while not self._stopping:
            if self._alone and self.holdings.get(self._alone):
                return None
            self._alone = None
            if self._suspects:
                return self._run_alone()
            room = min(self.window - len(self.holdings), self.supervisor.room, CLAIM_GROUP)
            if room <= 0 or not self._more:
                if claimed and self._more:
                    self.on_more()
                return None
            self._more = False  # before the claim: a wake-up that comes during it counts
            claims = self.database.transact(
                partial(claim, worker_id=self.worker_id(), model=self.model, limit=room)
            )
            claimed = True
            if len(claims) == room:
                self._more = True
            self._admit(self.holdings.add(claims))

    def _admit(self, holdings: list[Holding]) -> None:
        suspects = [holding for holding in holdings if holding.claim.crashes >= self.max_crashes]
        self._suspects.extend(suspects)
        self._send([holding for holding in holdings if holding not in suspects])

    def _run_alone(self) -> None:
        """One suspect at a time, with nothing else in the engine; its end wakes us for the next."""
        if self.supervisor.num_in_flight > 0 or self.supervisor.room == 0:
            return
        holding = self._suspects.popleft()
        if self.holdings.get(holding.id) is None:  # no longer ours: the lease was lost meanwhile
            self._wake.set()
            return
        self._alone = holding.id
        log.warning("claimer.alone job=%s crashes=%d", holding.claim.job_id, holding.claim.crashes)
        self._send([holding])
        self._wake.set()

    def _send(self, holdings: list[Holding]) -> None:
        requests: list[Request] = []
        for holding in holdings:
            if self._stopping:
                break  # the drain hands the rest back
            try:
                request = self.encode(holding.claim)
            except BaseException as error:  # a tokenizer may raise anything, Rust panics included
                if not isinstance(error, ValueError):
                    log.error("claimer.encode job=%s error=%s", holding.claim.job_id, type(error).__name__)
                if self.holdings.mark_dropped(holding):
                    self.finish(_refusal(holding.claim, error))
                continue
            if self.holdings.mark_sent(holding):
                requests.append(request)
        try:
            if requests:
                self.supervisor.add(requests)
        except (EngineGoneError, NoCreditError, ValueError):
            # The engine died between the claim and now, and never saw these.
            for request in requests:
                self.finish(Outcome(job_id=request.id.job_id, fence=request.id.fence, kind="released"))
            self._more = True


def _refusal(claim: Claim, error: BaseException) -> Outcome:
    said = str(error) if isinstance(error, ValueError) else "the tokenizer failed on this job's text"
    return Outcome(
        job_id=claim.job_id,
        fence=claim.fence,
        kind="failed",
        error={
            "code": getattr(error, "code", None)
            or ("invalid_request" if isinstance(error, ValueError) else "encode_failed"),
            "message": said,
            "param": getattr(error, "param", None),
        },
    )
