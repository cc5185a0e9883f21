"""Prices: what a million tokens of a model cost, and since when.

Owns the prices table and the arithmetic of a bill, which is exact: amounts are decimals, from the operator's text to
the answer's, never floats. A price holds from its start until the model's next one starts. One whose start has passed
never changes, so what was billed yesterday costs tomorrow what it costs today; only a model that has no price yet can
be given one for the past. All prices are in one currency, because sums over models would mean nothing otherwise.
Refuses to know what was used (`jobs.usage`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Any, Final

from sqlalchemy import Connection, Row, delete, insert, select, text

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.dialects import clock
from jobs.models import Price
from jobs.texts import MAX_MODEL_CHARS

MILLION_DIGITS: Final = 6  # tokens are priced by the million
_AMOUNT: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,12})?")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
# Token counts of 18 digits times amounts of 24, summed over many rows: nothing is ever rounded.
EXACT: Final = Context(prec=100, rounding=ROUND_HALF_EVEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceView:
    """Amounts per million tokens; `cached_prompt` for prompt tokens that needed no computing. `valid_from` in unix
    seconds."""

    model: str
    valid_from: float
    currency: str
    prompt: Decimal
    cached_prompt: Decimal
    completion: Decimal

    def cost(self, *, prompt: int, cached: int, completion: int) -> Decimal:
        """Of so many tokens; `cached` are among `prompt`. Exact."""
        parts = (
            EXACT.multiply(Decimal(prompt - cached), self.prompt),
            EXACT.multiply(Decimal(cached), self.cached_prompt),
            EXACT.multiply(Decimal(completion), self.completion),
        )
        return total(parts).scaleb(-MILLION_DIGITS, EXACT)


def total(costs: Iterable[Decimal]) -> Decimal:
    """Their exact sum."""
    made = Decimal(0)
    for cost in costs:
        made = EXACT.add(made, cost)
    return made


def amount_text(amount: Decimal) -> str:
    """Plain digits without needless zeros: `0.15`, `3`, never `3E+1`."""
    plain = format(amount, "f")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain


def parse_amount(name: str, amount: str) -> Decimal:
    """A decimal such as `0.15`. Raises `BadField`."""
    if not _AMOUNT.fullmatch(amount):
        raise BadField(
            name, "must be a decimal such as 0.15, with at most 12 digits before and 12 behind the point"
        )
    return Decimal(amount)


class Prices:
    """The operator's view; each call is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set(
        self,
        model: str,
        *,
        prompt: str,
        completion: str,
        cached_prompt: str | None = None,
        currency: str,
        valid_from: float | None = None,
    ) -> PriceView:
        """A price from `valid_from` (unix seconds, None: now) on; one that is to start at the same moment, and has
        not yet, is replaced. `cached_prompt` None: as `prompt`. Raises `BadField`."""
        if not 1 <= len(model) <= MAX_MODEL_CHARS or not model.isprintable():
            raise BadField("model", f"must be 1 to {MAX_MODEL_CHARS} printable characters")
        if not _CURRENCY.fullmatch(currency):
            raise BadField("currency", "must be three capital letters, such as EUR")
        amounts = {
            "prompt": parse_amount("prompt", prompt),
            "cached_prompt": parse_amount(
                "cached_prompt", prompt if cached_prompt is None else cached_prompt
            ),
            "completion": parse_amount("completion", completion),
        }
        row = {name: amount_text(amount) for name, amount in amounts.items()}
        times: list[float] = []  # of this call's tries

        def work(connection: Connection) -> PriceView:
            if connection.dialect.name == "postgresql":  # the checks below hold until the commit
                connection.execute(text("LOCK TABLE prices IN SHARE ROW EXCLUSIVE MODE"))
            tried = select(*Price.__table__.columns).where(Price.model == model, Price.created_at.in_(times))
            if (made := connection.execute(tried).one_or_none()) is not None:
                return _view(made)  # committed before the connection was lost
            time_now = clock(connection)
            times.append(time_now)
            start = time_now if valid_from is None else valid_from
            _check(connection, model, currency, start, time_now)
            connection.execute(delete(Price).where(Price.model == model, Price.valid_from == start))
            connection.execute(
                insert(Price).values(
                    model=model, valid_from=start, currency=currency, created_at=time_now, **row
                )
            )
            return PriceView(model=model, valid_from=start, currency=currency, **amounts)

        return self._database.transact(work)

    def all(self) -> list[PriceView]:
        """By model, then by start."""
        with self._database.read() as connection:
            return list(price_list(connection).values())


def price_list(connection: Connection) -> dict[tuple[str, float], PriceView]:
    """Every price, by model and start, in this order."""
    query = select(*Price.__table__.columns).order_by(Price.model, Price.valid_from)
    return {(row.model, row.valid_from): _view(row) for row in connection.execute(query)}


def _check(connection: Connection, model: str, currency: str, start: float, time_now: float) -> None:
    other = connection.scalars(select(Price.currency).where(Price.currency != currency).limit(1)).first()
    if other is not None:
        raise BadField("currency", f"must be {other}: all prices are in one currency")
    if start < 0 or start != start or start > 1e11:
        raise BadField("from", "must be a time in unix seconds")
    if start < time_now:
        priced = connection.scalars(select(Price.model).where(Price.model == model).limit(1)).first()
        if priced is not None:
            raise BadField(
                "from", "must not lie in the past: this model has a price, and history stays as it is"
            )


def _view(row: Row[Any]) -> PriceView:
    return PriceView(
        model=row.model,
        valid_from=row.valid_from,
        currency=row.currency,
        prompt=Decimal(row.prompt),
        cached_prompt=Decimal(row.cached_prompt),
        completion=Decimal(row.completion),
    )
