"""Tallies: what each tenant has open, stored and had billed today, as sums that are always right.

Owns the counters behind the quotas. Whoever accepts or ends jobs adds the difference in the same transaction, so the
sums equal the rows at every commit and a submit never counts a queue. A tenant's sums are spread over a few rows:
each transaction adds to one of them, picked by chance, so that workers which end jobs of one tenant do not wait for
each other. A single row may thus be negative; only the sum over all of them means anything.

Call `add` last and once in a transaction: rows are locked in the order jobs, batches, tallies, then by tenant.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, case, func, select
from sqlalchemy.dialects import postgresql, sqlite

from jobs.dialects import clock, in_words_of, now, unix_day
from jobs.json_text import written
from jobs.models import Tally
from jobs.moments import DAY_SECONDS

SHARDS = 8  # on SQLite 1: it has a single writer anyway


@dataclass(frozen=True, slots=True)
class Change:
    """A difference. `tokens`: estimated, of open jobs; `billed`: tokens, prompt and completion."""

    tenant: str
    jobs: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    billed: int = 0


def ended(tenant: str, estimated_tokens: int) -> Change:
    """A job that ended without a result."""
    return Change(tenant, jobs=-1, tokens=-estimated_tokens)


@dataclass(frozen=True, slots=True)
class Use:
    """Sums of one tenant. `day_left`: seconds until the UTC day ends."""

    queued_jobs: int
    queued_tokens: int
    stored_bytes: int
    tokens_per_day: int
    day_left: float


def size_of(value: Any) -> int:
    """Bytes of a JSON column's value as it is stored: ASCII, so characters are bytes."""
    return len(written(value))


def add(connection: Connection, changes: Iterable[Change]) -> None:
    """Add the changes to their tenants' sums. Nothing to add touches no row."""
    sums: dict[str, list[int]] = {}
    for change in changes:
        total = sums.setdefault(change.tenant, [0, 0, 0, 0])
        for i, number in enumerate((change.jobs, change.tokens, change.stored_bytes, change.billed)):
            total[i] += number
    rows = [
        {
            "tenant": tenant,
            "open_jobs": total[0],
            "open_tokens": total[1],
            "stored_bytes": total[2],
            "day_tokens": total[3],
        }
        for tenant, total in sorted(sums.items())
        if any(total)
    ]
    if not rows:
        return
    one_writer = connection.dialect.name == "sqlite"
    shard = 0 if one_writer else random.randrange(SHARDS)
    connection.execute(_add(connection.dialect.name), [row | {"shard": shard} for row in rows])


@in_words_of
def _add(insert: type[sqlite.Insert | postgresql.Insert]) -> Any:
    statement = insert(Tally).values(day=unix_day(now()))
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=["tenant", "shard"],
        set_={
            "open_jobs": Tally.open_jobs + new.open_jobs,
            "open_tokens": Tally.open_tokens + new.open_tokens,
            "stored_bytes": Tally.stored_bytes + new.stored_bytes,
            "day_tokens": case(
                (Tally.day == new.day, Tally.day_tokens + new.day_tokens),
                (Tally.day < new.day, new.day_tokens),
                else_=Tally.day_tokens,  # ours began before midnight: it belongs to the day that is over
            ),
            "day": case((Tally.day < new.day, new.day), else_=Tally.day),
        },
    )


def used(connection: Connection, tenant: str) -> Use:
    """The tenant's sums now. Between two calls others may add, unless the caller holds a lock against them."""
    time_now = clock(connection)
    today = time_now // DAY_SECONDS
    row = connection.execute(
        select(
            func.coalesce(func.sum(Tally.open_jobs), 0),
            func.coalesce(func.sum(Tally.open_tokens), 0),
            func.coalesce(func.sum(Tally.stored_bytes), 0),
            func.coalesce(func.sum(case((Tally.day == today, Tally.day_tokens), else_=0)), 0),
        ).where(Tally.tenant == tenant)
    ).one()
    jobs, tokens, stored, billed = map(int, row)
    return Use(jobs, tokens, stored, billed, day_left=(today + 1) * DAY_SECONDS - time_now)
