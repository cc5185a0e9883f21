"""Usage: what tenants were billed, and what was made beside that, summed over the ledger.

Owns the one query behind `/v1/usage`. Billed rows of the ledger equal the results, so its sums do; cancelled and
wasted tokens are summed apart and cost nothing. A question about some days reads those days' rows of its tenants, by
the index on tenant and time, and nothing else. Groups are paged by keyset on their own names. Refuses to know who
asks.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Row, Select, func, literal, literal_column, select, tuple_

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.dialects import unix_day
from jobs.models import LedgerEntry, Price, Tenant
from jobs.moments import DAY_SECONDS
from jobs.prices import PriceView, price_list, total
from jobs.states import LedgerKind

MAX_GROUPS: Final = 1000  # of one page
_ROWS_AT_A_TIME: Final = 1000


class GroupBy(StrEnum):
    DAY = "day"  # of UTC
    TENANT = "tenant"
    MODEL = "model"
    KEY = "key"
    BATCH = "batch"


_COLUMNS: Final[dict[GroupBy, ColumnElement[Any]]] = {
    GroupBy.DAY: unix_day(LedgerEntry.created_at),
    GroupBy.TENANT: LedgerEntry.tenant.expression,
    GroupBy.MODEL: LedgerEntry.model.expression,
    GroupBy.KEY: func.coalesce(LedgerEntry.key_id, ""),
    GroupBy.BATCH: func.coalesce(LedgerEntry.batch_id, ""),
}
_IS_NUMBER: Final = frozenset({GroupBy.DAY})


@dataclass(slots=True)
class Tokens:
    """`attempts`: rows of the ledger. `cached` tokens are among `prompt`."""

    attempts: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def add(self, row: Row[Any]) -> None:
        self.attempts += int(row.attempts)
        self.prompt += int(row.prompt)
        self.cached += int(row.cached)
        self.completion += int(row.completion)


@dataclass(slots=True, kw_only=True)
class UsageGroup:
    """Sums of one group. `names`: what it is of, by `GroupBy`: a unix day, or an id, "" where there is none. `cost`:
    of what was billed; None when a model among it had no price."""

    names: dict[GroupBy, Any]
    tokens: dict[LedgerKind, Tokens] = field(default_factory=lambda: {kind: Tokens() for kind in LedgerKind})
    cost: Decimal | None = Decimal(0)
    currency: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """`tenant` None: all tenants. `start` and `end`: unix seconds, the end excluded. `after`: a page's `next`."""

    tenant: str | None
    group_by: tuple[GroupBy, ...] = ()
    start: float | None = None
    end: float | None = None
    after: str | None = None
    limit: int = 100


@dataclass(frozen=True, slots=True)
class UsagePage:
    """`next`: where the following page begins; None: there is none."""

    groups: list[UsageGroup]
    next: str | None


class Usages:
    """Each call is one read transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, query: UsageQuery) -> UsagePage:
        """Groups in the order of their names. Raises `BadField` for an `after` that is none of its own."""
        edge = None if query.after is None else _decode(query.after, query.group_by)
        keys = [f"key_{index}" for index in range(len(query.group_by))]
        with self._database.read() as connection:
            tenants: Sequence[str] = [query.tenant] if query.tenant is not None else []
            if query.tenant is None:
                tenants = list(connection.scalars(select(Tenant.id)))
            statement = _sums(query, tenants, edge)
            rows = connection.execute(statement, execution_options={"yield_per": _ROWS_AT_A_TIME})
            found = itertools.groupby(rows, lambda row: tuple(getattr(row, key) for key in keys))
            parts = [(names, list(of_it)) for names, of_it in itertools.islice(found, query.limit + 1)]
            rows.close()
            prices = price_list(connection)  # afterwards, so that whatever the sums name is among them
        if not query.group_by and not parts:
            parts = [((), [])]
        groups = [_group(query.group_by, names, of_it, prices) for names, of_it in parts[: query.limit]]
        return UsagePage(groups, _encode(groups[-1]) if len(parts) > query.limit else None)


def _sums(query: UsageQuery, tenants: Sequence[str], edge: tuple[Any, ...] | None) -> Select[Any]:
    """One row per group, kind, model and price."""
    names = [_COLUMNS[by] for by in query.group_by]
    price = (
        select(func.max(Price.valid_from))
        .where(Price.model == LedgerEntry.model, Price.valid_from <= LedgerEntry.created_at)
        .scalar_subquery()
    )
    columns = [name.label(f"key_{index}") for index, name in enumerate(names)]
    # Grouped by their places in the list of columns: an expression with parameters is not the same one twice.
    width = len(columns) + 3
    statement = (
        select(
            *columns,
            LedgerEntry.kind,
            LedgerEntry.model.label("of_model"),
            price.label("price_from"),
            func.count().label("attempts"),
            func.sum(LedgerEntry.prompt_tokens).label("prompt"),
            func.sum(LedgerEntry.cached_tokens).label("cached"),
            func.sum(LedgerEntry.completion_tokens).label("completion"),
        )
        .where(LedgerEntry.tenant.in_(tenants))
        .group_by(*(_place(number) for number in range(1, width + 1)))
        .order_by(*(_place(number) for number in range(1, len(columns) + 1)))
    )
    if query.start is not None:
        statement = statement.where(LedgerEntry.created_at >= query.start)
    if query.end is not None:
        statement = statement.where(LedgerEntry.created_at < query.end)
    if edge is not None:
        if query.group_by[0] is GroupBy.DAY:  # said twice, for the index on time
            statement = statement.where(LedgerEntry.created_at >= edge[0] * DAY_SECONDS)
        statement = statement.where(tuple_(*names) > tuple_(*(literal(value) for value in edge)))
    return statement


def _place(number: int) -> ColumnElement[Any]:
    return literal_column(str(number))


def _group(
    by: Sequence[GroupBy],
    names: tuple[Any, ...],
    rows: Sequence[Row[Any]],
    prices: dict[tuple[str, float], PriceView],
) -> UsageGroup:
    group = UsageGroup(names=dict(zip(by, names, strict=True)))
    costs: list[Decimal] = []
    priced = True
    for row in rows:
        kind = LedgerKind(row.kind)
        group.tokens[kind].add(row)
        if kind is not LedgerKind.BILLED:
            continue  # costs nothing, at any price
        price = prices.get((row.of_model, row.price_from))
        if price is None:
            priced = False
        else:
            costs.append(
                price.cost(prompt=int(row.prompt), cached=int(row.cached), completion=int(row.completion))
            )
    group.cost = total(costs) if priced else None
    group.currency = next((one.currency for one in prices.values()), None) if priced else None
    return group


def _encode(group: UsageGroup) -> str:
    text = json.dumps(list(group.names.values()), separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _can_be_asked(value: int | str) -> bool:
    """False for what a database would choke on."""
    if isinstance(value, int):
        return 0 <= value < 2**31
    return "\x00" not in value and not any("\ud800" <= one <= "\udfff" for one in value)


def _decode(after: str, by: Sequence[GroupBy]) -> tuple[Any, ...]:
    try:
        values = json.loads(base64.b64decode(after + "=" * (-len(after) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        values = None
    kinds = [int if one in _IS_NUMBER else str for one in by]
    if (
        not isinstance(values, list)
        or [type(value) for value in values] != kinds
        or not by
        or not all(_can_be_asked(value) for value in values)
    ):
        raise BadField("after", "must be the `next` of a page with the same group_by")
    return tuple(values)
