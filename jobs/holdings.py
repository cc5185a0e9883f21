"""Holdings: the jobs that this worker process holds right now, from claim to committed outcome.

Owns one dictionary under one lock, shared by the claimer, the engine's reader, the lease keeper and the
writer. It is the worker's memory, never the truth: when it and SQL disagree, SQL wins (`lease_keeper`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from engine.growth import Growth, size_of
from engine.request import RequestId
from jobs.claims import Claim
from jobs.terms import Tier


@dataclass(slots=True)
class Holding:
    claim: Claim
    sent: bool = False  # handed to the engine process
    dropped: bool = False  # cancelled or handed back before it was sent: never send it
    num_generated: int = 0  # as of the last progress frame
    num_saved: int = 0  # tokens that its checkpoint in SQL holds

    @property
    def id(self) -> RequestId:
        return RequestId(self.claim.job_id, self.claim.fence)

    @property
    def in_background(self) -> bool:
        return self.claim.tier is Tier.BACKGROUND

    @property
    def progressed(self) -> bool:
        """Whether it is safe in SQL that it got further than where it was claimed."""
        return self.num_saved > size_of(self.claim.generated)


class Holdings:
    """All methods are safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._emptied = threading.Condition(self._lock)
        self._held: dict[RequestId, Holding] = {}
        self._num_background = 0
        self._of_tenants: Counter[str] = Counter()

    def __len__(self) -> int:
        with self._lock:
            return len(self._held)

    @property
    def num_background(self) -> int:
        """How many of them are of the background tier."""
        with self._lock:
            return self._num_background

    @property
    def of_tenants(self) -> Counter[str]:
        """How many of them each tenant has; a copy."""
        with self._lock:
            return self._of_tenants.copy()

    def add(self, claims: Iterable[Claim]) -> list[Holding]:
        holdings = [Holding(claim, num_saved=size_of(claim.generated)) for claim in claims]
        with self._lock:
            self._held.update((holding.id, holding) for holding in holdings)
            self._num_background += sum(holding.in_background for holding in holdings)
            self._of_tenants.update(holding.claim.tenant for holding in holdings)
        return holdings

    def get(self, request_id: RequestId) -> Holding | None:
        with self._lock:
            return self._held.get(request_id)

    def all(self) -> list[Holding]:
        with self._lock:
            return list(self._held.values())

    def mark_sent(self, holding: Holding) -> bool:
        """Claim the right to send it; False when it was dropped, or is no longer held."""
        with self._lock:
            holding.sent = not holding.dropped and self._held.get(holding.id) is holding
            return holding.sent

    def mark_dropped(self, holding: Holding) -> bool:
        """Claim the right to end it here; False when it was sent, so that only the engine can end it."""
        with self._lock:
            if holding.sent or holding.dropped:
                return False
            holding.dropped = True
            return True

    def progress(self, num_generated: dict[RequestId, int]) -> None:
        with self._lock:
            for request_id, count in num_generated.items():
                if holding := self._held.get(request_id):
                    holding.num_generated = count

    def saved(self, growths: Iterable[Growth]) -> None:
        with self._lock:
            for growth in growths:
                if holding := self._held.get(growth.id):
                    holding.num_saved = sum(growth.starts) + size_of(growth.generated)

    def remove(self, request_ids: Iterable[RequestId]) -> None:
        with self._lock:
            for request_id in request_ids:
                if holding := self._held.pop(request_id, None):
                    self._num_background -= holding.in_background
                    self._of_tenants[holding.claim.tenant] -= 1
            self._of_tenants = +self._of_tenants  # those who have none left are not kept
            if not self._held:
                self._emptied.notify_all()

    def clear(self) -> None:
        self.remove([holding.id for holding in self.all()])

    def wait_empty(self, timeout: float) -> bool:
        with self._lock:
            return self._emptied.wait_for(lambda: not self._held, timeout)
