"""Fair tags: in which order the queued jobs of a tier are taken, so that nobody waits behind another's long queue.

Start-time fair queueing (Goyal, Vin and Cheng 1996). A flow is a tenant's jobs of one model, tier and priority. Each
job gets a tag when it is queued: the virtual time at which the flow's turn comes, counted in estimated tokens over
the flow's share. A flow that has been idle starts at the virtual time of now, which is the tag at the head of the
queue; so ten jobs that come behind somebody's hundred thousand get tags near the head. Shares are the tenant's
weight, doubled by each step of priority: who uses priority has more of the machines, as a higher weight would give.

Tags are cut to buckets, inside which jobs are ordered by their prefix group, so that fairness does not tear
apart what shares a prefix. Owns the table of the flows' clocks. The rows of clocks are locked before those of jobs
that an insert makes, in the order of their keys; only a sweep that makes delayed jobs due holds jobs before, which
nobody else waits for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, Float, bindparam, case, func, select
from sqlalchemy.dialects import postgresql, sqlite

from jobs.claims import QUEUED
from jobs.database import in_words_of
from jobs.models import FairClock, Job, Tenant
from jobs.terms import tier_of

BUCKET_TOKENS: Final = 16_384.0  # of virtual time; some ten to hundred jobs of one tenant

Row = dict[str, Any]  # by column of `models.Job`
Flow = tuple[str, str, int, int]  # tenant, model, tier, priority


def tags(connection: Connection, rows: Sequence[Row]) -> list[float]:
    """The `fair_tag` of each row, in their order; their flows' clocks move on."""
    flows: defaultdict[Flow, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        flow = (row["tenant"], row["model"], int(tier_of(row["tier"])), row["priority"])
        flows[flow].append(place)
    given = [0.0] * len(rows)
    weights = _weights(connection, sorted({flow[0] for flow in flows}))
    for flow in sorted(flows):
        share = weights.get(flow[0], 1.0) * 2.0 ** flow[3]
        costs = [max(1, int(rows[place]["estimated_tokens"])) / share for place in flows[flow]]
        turn = _turn(connection, flow, sum(costs))
        for place, cost in zip(flows[flow], costs, strict=True):
            given[place] = turn // BUCKET_TOKENS * BUCKET_TOKENS
            turn += cost
    return given


def _weights(connection: Connection, tenants: list[str]) -> dict[str, float]:
    return {row.id: row.weight for row in connection.execute(_WEIGHTS, {"tenants": tenants})}


def _turn(connection: Connection, flow: Flow, cost: float) -> float:
    """When the flow's turn is; it ends `cost` later."""
    tenant, model, tier, priority = flow
    virtual = _virtual_time(connection, model, tier)
    values = {"tenant": tenant, "model": model, "tier": tier, "priority": priority}
    moved = {"turn_ends": virtual + cost, "virtual": virtual, "cost": cost}
    ends: float = connection.scalars(_move_clock(connection.dialect.name), values | moved).one()
    return ends - cost


@in_words_of
def _move_clock(insert: type[sqlite.Insert | postgresql.Insert]) -> Any:
    virtual, cost = bindparam("virtual", type_=Float), bindparam("cost", type_=Float)
    later = case((FairClock.turn_ends > virtual, FairClock.turn_ends), else_=virtual)
    columns = ("tenant", "model", "tier", "priority", "turn_ends")
    return (
        insert(FairClock)
        .values({name: bindparam(name) for name in columns})
        .on_conflict_do_update(
            index_elements=["model", "tier", "tenant", "priority"], set_={"turn_ends": later + cost}
        )
        .returning(FairClock.turn_ends)
    )


def _virtual_time(connection: Connection, model: str, tier: int) -> float:
    """The tag at the head of the queue; of an empty queue, where its last flow ended."""
    queue = {"model": model, "tier": tier}
    head = connection.scalars(_HEAD, queue).first()
    return float(connection.scalar(_ENDS, queue) or 0.0) if head is None else float(head)


# made once: to build a statement takes as long as to run it
_WEIGHTS = select(Tenant.id, Tenant.weight).where(Tenant.id.in_(bindparam("tenants", expanding=True)))
_HEAD = (
    select(Job.fair_tag)
    .where(Job.model == bindparam("model"), Job.tier == bindparam("tier"), QUEUED)
    .order_by(Job.fair_tag)
    .limit(1)
)
_ENDS = select(func.max(FairClock.turn_ends)).where(
    FairClock.model == bindparam("model"), FairClock.tier == bindparam("tier")
)
