"""Job rows: what a new job is in SQL, whichever door it came through.

Owns ids, seeds, order keys and the INSERT. A row is made before its transaction begins, so that a transaction whose
commit got lost can be run again with the same rows; `insert_all` and `insert_new` add what only the database knows.
Refuses to know doors, quotas and who asked.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, cast

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite

from engine.request import derive_seed
from jobs import tallies
from jobs.audience import Audience
from jobs.body import JobBody
from jobs.bulk_insert import Column, insert_spelled, spelled
from jobs.dialects import clock, in_words_of
from jobs.drafts import Drafts, draft_of
from jobs.fair_tags import FLOW_COLUMNS, flows, tags, take_turns
from jobs.models import Job
from jobs.quotas import Load
from jobs.reads import JobView
from jobs.settings import Settings
from jobs.states import TERMINAL, JobState
from jobs.tenants import Owner
from jobs.terms import ORDINARY, Retry, Terms, Tier, tier_of

_QUEUED = str(JobState.QUEUED)
_TABLE = cast(Table, Job.__table__)
# fmt: off
_SHOWN = (
    "id", "model", "batch_id", "position", "custom_id", "metadata", "estimated_tokens", "num_samples", "priority",
    "not_before", "deadline",
)
# fmt: on

JobRow = dict[str, Any]  # by column of `models.Job`


def new_id(kind: str, position: int = 0) -> str:
    """`job_` and 32 hex digits that sort by time, then by position: 48 bits ms, 32 position, 48 random."""
    return f"{kind}_{time.time_ns() // 1_000_000:012x}{position:08x}{secrets.token_hex(6)}"


def job_row(
    job_id: str,
    body: JobBody,
    owner: Owner,
    settings: Settings,
    *,
    source: str,
    terms: Terms = ORDINARY,
    audience: Audience = Audience.NOBODY,
    batch_id: str | None = None,
    position: int = 0,
) -> JobRow:
    """A queued job. Raises ValueError when `body` names no model yet."""
    draft = draft_of(body, settings)
    shared = shared_columns(owner, source=source, terms=terms, audience=audience, batch_id=batch_id)
    return {
        "id": job_id,
        "position": position,
        **draft._asdict(),
        "seed": _seed(job_id, draft.seed),
        **shared,
    }


def shared_columns(
    owner: Owner,
    *,
    source: str,
    terms: Terms,
    batch_id: str | None,
    audience: Audience = Audience.NOBODY,
) -> JobRow:
    """Those that all jobs of a submit have in common."""
    return {
        "tenant": owner.tenant,
        "key_id": owner.key_id,
        "batch_id": batch_id,
        "source": source,
        "state": _QUEUED,
        "audience": int(audience),
        **terms.columns(),
    }


def columns_of(
    ids: Sequence[str], drafts: Drafts, positions: Sequence[int], shared: JobRow
) -> dict[str, Column]:
    """Queued jobs, for `ReadyRows`. `shared`: as `shared_columns` made it."""
    return {
        "id": ids,
        "position": positions,
        "custom_id": drafts.custom_ids,
        "model": drafts.models,
        "body": drafts.bodies,
        "metadata": drafts.metadata,
        "seed": [_seed(job_id, seed) for job_id, seed in zip(ids, drafts.seeds, strict=True)],
        "estimated_tokens": drafts.estimated_tokens,
        "num_samples": drafts.num_samples,
        "prefix_group": drafts.prefix_groups,
        **{name: [value] * len(ids) for name, value in shared.items()},
    }


def _seed(job_id: str, wanted: int | None) -> int:
    return derive_seed("job", job_id) if wanted is None else wanted


def again_row(
    old: Any, job_id: str, owner: Owner, *, batch_id: str | None = None, position: int = 0, later: float
) -> JobRow:
    """The same job once more, from all columns of its row: body, model and seed as they are stored, so the same
    tokens come. Its window is as long as it was and begins so many seconds `later`; a promotion to urgent does not
    carry over."""
    terms = Terms(
        tier=Tier.NORMAL if tier_of(old.tier) is Tier.URGENT else tier_of(old.tier),
        priority=old.priority,
        retry=None if old.retry is None else Retry(**old.retry),
        deadline=None if old.deadline is None else old.deadline + later,
    )
    return {
        "id": job_id,
        "tenant": owner.tenant,
        "key_id": owner.key_id,
        "batch_id": batch_id,
        "position": position,
        "custom_id": old.custom_id,
        "model": old.model,
        "source": "http",
        "body": old.body,
        "metadata": old.metadata,
        "seed": old.seed,
        "estimated_tokens": old.estimated_tokens,
        "num_samples": old.num_samples,
        "state": _QUEUED,
        "prefix_group": old.prefix_group,
        "retry_of": old.id,
        **terms.columns(),
    }


def refused_row(job_id: str, tenant: str, model: str, error: dict[str, Any]) -> JobRow:
    """A Redis message that was refused: nobody waits for a 400, so it becomes a failed job with `error`."""
    return {
        "id": job_id,
        "tenant": tenant,
        "key_id": None,
        "batch_id": None,
        "position": 0,
        "custom_id": None,
        "model": model,
        "source": "redis",
        "body": {},
        "metadata": {},
        "seed": derive_seed("job", job_id),
        "estimated_tokens": 0,
        "num_samples": 1,
        "state": str(JobState.FAILED),
        "prefix_group": 0,
        "error": error,
        **ORDINARY.columns(),
    }


def load_of(rows: Sequence[JobRow]) -> Load:
    """What these rows add to their tenant."""
    return Load(
        jobs=len(rows),
        tokens=sum(int(row["estimated_tokens"]) for row in rows),
        stored_bytes=sum(tallies.size_of(row["body"]) for row in rows),
    )


@dataclass(frozen=True, slots=True)
class Stamp:
    """What only the database knew of rows that went in: when, in unix seconds, and each one's `fair_tag` by id."""

    created_at: float
    fair_tags: dict[str, float]

    def view(self, row: JobRow) -> JobView:
        """The job of one of these rows, as `jobs.reads` would show it now."""
        return JobView(
            state=JobState.QUEUED,
            tier=tier_of(row["tier"]),
            created_at=self.created_at,
            started_at=None,
            finished_at=None,
            fair_tag=self.fair_tags[row["id"]],
            attempts=0,
            error=None,
            outputs=None,
            usage=None,
            **{name: row[name] for name in _SHOWN},
        )


class ReadyRows:
    """Queued rows whose ids are new, by column and in the order of their ids, spelled for one kind of database as far
    as that can be done before their transaction begins."""

    def __init__(self, dialect: str, columns: Mapping[str, Column]) -> None:
        self._ids = columns["id"]
        self._flows = flows(zip(*(columns[name] for name in FLOW_COLUMNS), strict=True))
        self._spelled = spelled(dialect, _TABLE, columns)

    def insert(self, connection: Connection) -> Stamp:
        count = len(self._ids)
        turns, created_at = take_turns(connection, self._flows, count)
        own: dict[str, Column] = {name: [value] * count for name, value in _common(created_at).items()}
        own["fair_tag"] = turns
        insert_spelled(connection, _TABLE, self._spelled, spelled(connection.dialect.name, _TABLE, own))
        return Stamp(created_at, dict(zip(self._ids, turns, strict=True)))


def insert_all(connection: Connection, rows: Sequence[JobRow]) -> Stamp:
    """Queued rows, all with the same columns, whose ids are new."""
    if not rows:
        return Stamp(0.0, {})
    ordered = _ordered(rows)
    columns = {name: [row[name] for row in ordered] for name in ordered[0]}
    return ReadyRows(connection.dialect.name, columns).insert(connection)


def insert_new(connection: Connection, rows: Sequence[JobRow]) -> list[str]:
    """INSERT … ON CONFLICT DO NOTHING; the ids that were new."""
    if not rows:
        return []
    ordered, common = _ordered(rows), _common(clock(connection))
    queued = [row for row in ordered if row["state"] == _QUEUED]
    turns = {row["id"]: turn for row, turn in zip(queued, tags(connection, queued), strict=True)}
    complete = [
        row
        | common
        | {
            "finished_at": common["created_at"] if row["state"] in TERMINAL else None,
            "fair_tag": turns.get(row["id"], 0.0),
        }
        for row in ordered
    ]
    return list(connection.scalars(_insert_new(connection.dialect.name), complete))


@in_words_of
def _insert_new(insert_into: type[sqlite.Insert | postgresql.Insert]) -> Any:
    return insert_into(Job).on_conflict_do_nothing(index_elements=["id"]).returning(Job.id)


def _ordered(rows: Sequence[JobRow]) -> list[JobRow]:
    """In id order like every statement that touches several jobs, so that two inserts cannot deadlock."""
    return sorted(rows, key=itemgetter("id"))


def _common(created_at: float) -> dict[str, Any]:
    """What new rows have in common. `created_at`: read once, so that all jobs of a batch have one, and the database's
    time, not this machine's."""
    return {"created_at": created_at, "fence": 0, "crashes": 0}
