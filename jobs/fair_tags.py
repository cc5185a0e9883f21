"""Fair tags: in which order the queued jobs of a tier are taken, so that nobody waits behind another's long queue.

Start-time fair queueing (Goyal, Vin and Cheng 1996). A flow is a tenant's jobs of one model, tier and priority. Each
job gets a tag when it is queued: the virtual time at which the flow's turn comes, counted in estimated tokens over
the flow's share. A flow that has been idle starts a little before the virtual time of now, which is the tag at the
head of the queue; so ten jobs that come behind somebody's hundred thousand are next, and a tenant who uses less than
its share never waits for one who uses more. Shares are the tenant's weight, doubled by each step of priority: who
uses priority has more of the machines, as a higher weight would give.

Tags are cut to buckets, inside which jobs are ordered by their prefix group, so that fairness does not tear apart
what shares a prefix. Near the head buckets are small, because others come and go between them: who has just come
waits for the rest of one, and who was there first is not passed by many. Owns the table of the flows' clocks. The
rows of clocks are locked before those of jobs that an insert makes, in the order of their keys; only a sweep that
makes delayed jobs due holds jobs before, which nobody else waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Float, Integer, bindparam, case, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import aliased

from jobs.conditions import JOB_QUEUED
from jobs.dialects import in_words_of, now
from jobs.models import ID, FairClock, Job, Tenant
from jobs.terms import DELAYED

BUCKET_TOKENS: Final = 16_384.0  # of virtual time; some ten to hundred jobs of one tenant
FINE_TOKENS: Final = 1_024.0  # of a bucket near the head
# By how much who was idle goes before the head: its tags are before those of jobs that were claimed last, too, whose
# bucket may be the one before the head's (`jobs.claimer`).
LEAD_TOKENS: Final = 2 * FINE_TOKENS

FLOW_COLUMNS: Final = ("tenant", "model", "tier", "priority", "estimated_tokens")

Row = dict[str, Any]  # by column of `models.Job`
Flow = tuple[str, str, int, int]  # tenant, model, tier, priority
Flows = dict[Flow, tuple[list[int], list[int]]]


def flows(rows: Iterable[Sequence[Any]]) -> Flows:
    """What `take_turns` has to know of these rows, given as values of `FLOW_COLUMNS`: places and estimated tokens by
    flow."""
    found: Flows = {}
    for place, (tenant, model, tier, priority, estimate) in enumerate(rows):
        flow = (tenant, model, tier % DELAYED, priority)
        places, tokens = found.get(flow) or found.setdefault(flow, ([], []))
        places.append(place)
        tokens.append(max(1, estimate))
    return found


def tags(connection: Connection, rows: Sequence[Row]) -> list[float]:
    """The `fair_tag` of each row, in their order; their flows' clocks move on."""
    return take_turns(connection, flows(map(itemgetter(*FLOW_COLUMNS), rows)), len(rows)).tags


class Turns(NamedTuple):
    """`time_now`: the database's, in unix seconds; it comes along, because to ask for it alone would cost another way
    there and back. 0.0 where there are no rows."""

    tags: list[float]
    time_now: float


def take_turns(connection: Connection, found: Flows, num_rows: int) -> Turns:
    """The same for rows of which `flows` has told."""
    given = [0.0] * num_rows
    time_now = 0.0
    for (tenant, model, tier, priority), (places, tokens) in sorted(found.items()):
        flow = {"tenant": tenant, "model": model, "tier": tier, "priority": priority, "steps": 2.0**priority}
        move = _move_clock(connection.dialect.name)
        moved = connection.execute(move, flow | {"tokens": float(sum(tokens))}).one()
        turn, time_now = moved.turn_ends - sum(tokens) / moved.share, moved.time_now
        head = turn if moved.head is None else moved.head
        fine_until = (head // BUCKET_TOKENS + 2) * BUCKET_TOKENS
        for place, cost in zip(places, tokens, strict=True):
            bucket = FINE_TOKENS if turn < fine_until else BUCKET_TOKENS
            given[place] = turn // bucket * bucket
            turn += cost / moved.share
    return Turns(given, time_now)


@in_words_of
def _move_clock(insert: type[sqlite.Insert | postgresql.Insert]) -> Any:
    """One statement for all that a turn depends on: each of its own would cost a way to the database and back."""
    tenant, model, tier = (
        bindparam("tenant", type_=ID),
        bindparam("model", type_=ID),
        bindparam("tier", type_=Integer),
    )
    weight = select(Tenant.weight).where(Tenant.id == tenant).scalar_subquery()
    share = func.coalesce(weight, 1.0) * bindparam("steps", type_=Float)
    head = (
        select(Job.fair_tag)
        .where(Job.model == model, Job.tier == tier, JOB_QUEUED)
        .order_by(Job.fair_tag)
        .limit(1)
        .scalar_subquery()
    )
    other = aliased(FairClock)
    ends = select(func.max(other.turn_ends)).where(other.model == model, other.tier == tier).scalar_subquery()
    # A little before the tag at the head of the queue; of an empty queue, where its last flow ended.
    virtual = func.coalesce(head - LEAD_TOKENS, ends, 0.0)
    cost = bindparam("tokens", type_=Float) / share
    started = insert(FairClock).values(
        tenant=tenant, model=model, tier=tier, priority=bindparam("priority"), turn_ends=virtual + cost
    )
    # What was to be inserted ends where this flow's turn would end if it began now.
    now_ends, then_ends = started.excluded.turn_ends, FairClock.turn_ends + cost
    return started.on_conflict_do_update(
        index_elements=["model", "tier", "tenant", "priority"],
        set_={"turn_ends": case((then_ends > now_ends, then_ends), else_=now_ends)},
    ).returning(FairClock.turn_ends, share.label("share"), head.label("head"), now().label("time_now"))
