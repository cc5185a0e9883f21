"""Quotas: whether a tenant may hand in what it is about to, decided inside the transaction that inserts it.

Owns the refusal; a job's tokens are estimated in `jobs.drafts`. Two submits of one tenant cannot both take the last
room: with a quota set, a submit locks its tenant's row before it looks at the sums, and holds it until its own share
is added and committed (on SQLite the write transaction is that lock). A tenant without quotas locks nothing. Refuses
to know HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import Connection, bindparam, select

from jobs.models import Tenant
from jobs.settings import Settings
from jobs.tallies import Change, Use, used
from jobs.tenants import limits, unknown_tenant

RETRY_SECONDS: Final = 30.0  # for room that other jobs make when they end
_MEANING: Final = {
    "queued_jobs": "jobs that have not ended",
    "queued_tokens": "estimated tokens of jobs that have not ended",
    "stored_bytes": "stored bytes",
    "tokens_per_day": "tokens billed per UTC day",
}


@dataclass(frozen=True, slots=True)
class Load:
    """What one submit adds to a tenant: jobs, their estimated tokens, and the bytes of their bodies."""

    jobs: int
    tokens: int
    stored_bytes: int

    def change(self, tenant: str) -> Change:
        """What it does to the tenant's sums once it is accepted."""
        return Change(tenant, jobs=self.jobs, tokens=self.tokens, stored_bytes=self.stored_bytes)


class QuotaExceeded(Exception):
    """`retry_after`: seconds after which the same submit may succeed; None: waiting alone does not help."""

    code = "quota_exceeded"
    param = None

    def __init__(self, quota: str, *, limit: int, used: int, asked: int, retry_after: float | None) -> None:
        self.quota = quota
        self.retry_after = retry_after
        more = f" and this asks for {asked}" if asked else ""
        self.message = f"{quota}: at most {limit} {_MEANING[quota]} are allowed, {used} are used{more}"
        super().__init__(self.message)

    def as_error(self) -> dict[str, str | None]:
        """As `models.Job.error` stores it."""
        return {"code": self.code, "message": self.message, "param": None}


class Room:
    """What a tenant may still hand in, for the length of one transaction."""

    def __init__(self, limits: dict[str, int | None], use: Use | None) -> None:
        self._limits = limits
        self._use = use

    def take(self, load: Load) -> None:
        """Count `load` as accepted. Raises `QuotaExceeded`, and then counts nothing."""
        self.check(load)
        if self._use is not None:
            self._use = _with(self._use, load)

    def check(self, load: Load) -> None:
        """Raises `QuotaExceeded` for the first quota that `load` asks for more of than there is."""
        use = self._use
        if use is None:
            return
        after = _with(use, load)
        for quota, limit in self._limits.items():
            if limit is None:
                continue
            before = getattr(use, quota)
            asked = getattr(after, quota) - before
            if quota == "tokens_per_day":
                # What the day will be billed is known later: today's quota only asks whether it is used up.
                fits = load.jobs == 0 or before < limit
            else:
                fits = asked <= 0 or before + asked <= limit
            if not fits:
                raise QuotaExceeded(
                    quota,
                    limit=limit,
                    used=before,
                    asked=asked,
                    retry_after=_retry_after(quota, limit, asked, use.day_left),
                )


def _with(use: Use, load: Load) -> Use:
    return replace(
        use,
        queued_jobs=use.queued_jobs + load.jobs,
        queued_tokens=use.queued_tokens + load.tokens,
        stored_bytes=use.stored_bytes + load.stored_bytes,
    )


def open_room(connection: Connection, tenant: str, settings: Settings) -> Room:
    """The room of `tenant` in this transaction. Of several tenants, ask in the order of their names.

    Raises `BadField` (`unknown_tenant`) when there is no such tenant.
    """
    own = connection.scalars(_QUOTAS, {"tenant": tenant}).one_or_none()
    if own is None:
        raise unknown_tenant()
    if all(limit is None for limit in limits(own, settings).values()):
        return Room({}, None)
    own = connection.scalars(_LOCKED_QUOTAS, {"tenant": tenant}).one()
    return Room(limits(own, settings), used(connection, tenant))


_QUOTAS = select(Tenant.quotas).where(Tenant.id == bindparam("tenant"))
_LOCKED_QUOTAS = _QUOTAS.with_for_update(key_share=True)


def _retry_after(quota: str, limit: int, asked: int, day_left: float) -> float | None:
    if quota == "tokens_per_day":
        return day_left if limit > 0 else None
    if quota == "stored_bytes" or asked > limit:  # nothing ends that; nor would an empty queue do
        return None
    return RETRY_SECONDS
