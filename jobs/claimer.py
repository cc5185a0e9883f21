"""Claimer: the thread that takes jobs from SQL whenever the engine has room, and turns them into requests.

Owns three decisions: how many to claim (a window of a few times what the engine runs at once, so that it can
plan, in groups, so that the first prompt is computed while the next is still being encoded); of which tiers (a
reserve beyond the window is for jobs that somebody waits for; another for those that came later but whose turn is
earlier than that of what is here, such as a newcomer's; background jobs come in only where nothing else is queued and
places in the engine would be idle, and there they yield by their priority); and that suspects of an engine death have
the engine to themselves (`quarantine` says which of them together).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from engine.request import Request, RequestId
from jobs.claims import Claim, claim
from jobs.database import Database, cause
from jobs.dialects import portions
from jobs.engine_process import EngineGoneError, NoCreditError
from jobs.holdings import Holding, Holdings
from jobs.outcomes import Outcome
from jobs.quarantine import SUSPECT, Quarantine
from jobs.supervisor import EngineSupervisor
from jobs.terms import Tier

log = logging.getLogger(__name__)

CLAIM_GROUP = 64  # while the engine has idle places
ENCODED_AT_ONCE = 32  # of a claim; between two of them the claimer can stop
BUSY_GROUP = 256  # while it has none: nobody waits for the first of them, and each claim costs a commit
ANSWERING = (Tier.INTERACTIVE, Tier.INTERACTIVE)
FOREGROUND = (Tier.INTERACTIVE, Tier.NORMAL)
OVERTAKING = (Tier.NORMAL, Tier.NORMAL)  # with a fair tag before the last one claimed
BACKGROUND = (Tier.BACKGROUND, Tier.BACKGROUND)
ALL = (ANSWERING, FOREGROUND, OVERTAKING, BACKGROUND)
RETRY_SECONDS = 1.0
STOP_SECONDS = 10.0


class Claimer(threading.Thread):
    """`window` is the most jobs held at once that are not of the background tier, `places` what the engine runs at
    once, `reserve` how many interactive jobs may be held beyond the window, and as many as `places` that overtake;
    `encode` makes a request of each claim, or says what is wrong with it, then that job fails."""

    def __init__(
        self,
        database: Database,
        holdings: Holdings,
        supervisor: EngineSupervisor,
        *,
        model: str,
        worker_id: Callable[[], str],
        encode: Callable[[Sequence[Claim]], Sequence[Request | BaseException]],
        finish: Callable[[Outcome], None],
        on_more: Callable[[], None],
        window: int,
        places: int,
        reserve: int,
        weights: str = "",
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
        self.places = places
        self.reserve = reserve
        self._slack = places // 4 + 1  # claim again when so many have left
        self.weights = weights
        self._quarantine = Quarantine()
        self._suspects: dict[str, Holding] = {}  # by job id, in order of work; not sent yet
        self._on_trial: frozenset[RequestId] = frozenset()  # suspects that have the engine to themselves
        # Tiers of which SQL may hold more for us than the last claim brought.
        self._more = set(ALL)
        self._reached = -math.inf  # the largest fair tag of a normal job that was claimed in order
        self._lock = threading.Lock()  # of the quarantine
        self._wake = threading.Event()
        self._stopping = False

    def wake(self) -> None:
        """There may be work (a message, a sweep): look."""
        self._more.update(ALL)
        self._wake.set()

    def on_room(self) -> None:
        """A job left: go on only if there was more to claim, so that an empty queue is not asked again and again."""
        held, background = len(self.holdings), self.holdings.num_background
        if (
            self._suspects
            or self._on_trial
            or (FOREGROUND in self._more and held - background <= max(self.window - self._slack, 0))
            or (BACKGROUND in self._more and held <= max(self.places - self._slack, 0))
        ):
            self._wake.set()

    def were_on_trial(self, ids: Collection[RequestId]) -> bool:
        """Whether these suspects had the engine to themselves: then nobody else can have killed it."""
        return bool(ids) and self._on_trial.issuperset(ids)

    def on_suspects(self, job_ids: Collection[str]) -> None:
        """An engine died with these in it, and they come back as suspects."""
        with self._lock:
            self._quarantine.died(job_ids)

    def on_ended(self, job_ids: Collection[str]) -> None:
        """These jobs are over, for good."""
        with self._lock:
            self._quarantine.ended(job_ids)

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
                log.error("claimer.database error=%s", cause(error))
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
            if any(self.holdings.get(request_id) for request_id in self._on_trial):
                return None
            self._on_trial = frozenset()
            if self._suspects:
                return self._try_suspects()
            tiers, room = self._next_claim()
            if room <= 0:
                if claimed and FOREGROUND in self._more:
                    self.on_more()
                return None
            # before the claim: a wake-up that comes during it counts
            overtakers = tiers == FOREGROUND and OVERTAKING in self._more
            self._more.discard(tiers)
            if tiers == FOREGROUND:
                self._more -= {ANSWERING, OVERTAKING}
            claims = self.database.transact(
                partial(
                    claim,
                    worker_id=self.worker_id(),
                    model=self.model,
                    limit=room,
                    tiers=tiers,
                    before=self._reached if tiers == OVERTAKING else None,
                    weights=self.weights,
                )
            )
            claimed = True
            if tiers == FOREGROUND and claims and claims[-1].tier is Tier.NORMAL:
                self._reached = max(claims[-1].fair_tag, self._reached)
            if len(claims) == room:
                self._more.add(tiers)
                if overtakers:
                    self._more.add(OVERTAKING)  # not all of them need be among these
            self._admit(self.holdings.add(self._with_turns(claims)))

    def _next_claim(self) -> tuple[tuple[Tier, Tier], int]:
        """Of which tiers, and how many; 0: nothing now."""
        held, background, free = len(self.holdings), self.holdings.num_background, self.supervisor.room
        foreground = held - background
        for tiers, room in (
            (FOREGROUND, min(self.window - foreground, free - self.reserve)),
            (ANSWERING, min(self.window + self.reserve - foreground, free)),
            (OVERTAKING, min(self.window + self.places - foreground, free - self.reserve)),
            (BACKGROUND, 0 if FOREGROUND in self._more else min(self.places - held, free - self.reserve)),
        ):
            if tiers in self._more and room > 0:
                return tiers, min(room, CLAIM_GROUP if held < self.places else BUSY_GROUP)
        return FOREGROUND, 0

    def _with_turns(self, claims: list[Claim]) -> list[Claim]:
        """In the engine whose tenant has little there goes first, or a few jobs would wait behind a window full of
        another's; in steps of what runs at once, so that most of a tenant's own are planned together. Urgent jobs go
        by deadline, to the minute. Another tenant's that are two turns later make way (`engine.making_way`)."""
        held = self.holdings.of_tenants
        turns: list[Claim] = []
        for one in claims:
            turn = float(held[one.tenant] // self.places)
            if one.tier is Tier.URGENT and one.deadline is not None:
                turn = one.deadline // 60
            turns.append(one if turn == one.turn else replace(one, turn=turn))
            held[one.tenant] += 1
        return turns

    def _admit(self, holdings: list[Holding]) -> None:
        suspects = [holding for holding in holdings if holding.claim.crashes >= SUSPECT]
        self._suspects |= {holding.claim.job_id: holding for holding in suspects}
        self._send([holding for holding in holdings if holding not in suspects])

    def _try_suspects(self) -> None:
        """One group of them, with nothing else in the engine; its end wakes us for the next."""
        if self.supervisor.num_in_flight > 0 or self.supervisor.room == 0:
            return
        # those that are no longer ours left when the lease was lost
        self._suspects = {
            name: holding
            for name, holding in self._suspects.items()
            if self.holdings.get(holding.id) is holding
        }
        with self._lock:
            names = self._quarantine.next_group(self._suspects)[: self.supervisor.room]
        group = [self._suspects.pop(name) for name in names]
        self._on_trial = frozenset(holding.id for holding in group)
        log.warning("claimer.trial jobs=%d", len(group))
        self._send(group)
        self._wake.set()

    def _send(self, holdings: list[Holding]) -> None:
        requests: list[Request] = []
        for some in portions(holdings, ENCODED_AT_ONCE):
            if self._stopping:
                break  # the drain hands the rest back
            made = self.encode([holding.claim for holding in some])
            for holding, request in zip(some, made, strict=True):
                if isinstance(request, BaseException):
                    self._refuse(holding, request)
                elif self.holdings.mark_sent(holding):
                    requests.append(request)
        try:
            if requests:
                self.supervisor.add(requests)
        except (EngineGoneError, NoCreditError, ValueError):
            # The engine died between the claim and now, and never saw these.
            for request in requests:
                self.finish(Outcome(job_id=request.id.job_id, fence=request.id.fence, kind="released"))
            self._more.update(ALL)

    def _refuse(self, holding: Holding, error: BaseException) -> None:
        if not isinstance(error, ValueError):
            log.error("claimer.encode job=%s error=%s", holding.claim.job_id, type(error).__name__)
        if self.holdings.mark_dropped(holding):
            self.finish(_refusal(holding.claim, error))


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
