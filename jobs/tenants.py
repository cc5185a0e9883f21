"""Tenants: who shares this service, and how much of it each may use.

Owns the tenants table and the names of the four quotas. A tenant's own setting wins over the deployment's default
(`NIGHTPRESS_QUOTA_…`), and `None` among its own settings means no limit. Refuses to know who is calling (`jobs.keys`)
and what is used up (`jobs.tallies`). Tenants are never deleted: jobs and bills carry their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, Row, insert, select, update

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.dialects import clock
from jobs.models import Tenant
from jobs.settings import Settings

DEFAULT: Final = "default"  # whose everything is while there are no keys
QUOTAS: Final = ("queued_jobs", "queued_tokens", "stored_bytes", "tokens_per_day")
MAX_QUOTA: Final = 2**62
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

Quotas = Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Owner:
    """For whom a job is, and by which key it came; no key: a caller on this machine, or Redis."""

    tenant: str
    key_id: str | None


OPERATOR: Final = Owner(DEFAULT, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantView:
    """`quotas`: the tenant's own, by name; None there is no limit, a name that is missing takes the default."""

    id: str
    weight: float
    quotas: dict[str, int | None]
    created_at: float


def check_tenant(name: object) -> str:
    """A name that a tenant can have. Raises `BadField`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadField(
            "tenant", "must be 1 to 63 of a-z, 0-9, dot, dash and underscore, a letter or digit first"
        )
    return name


def unknown_tenant() -> BadField:
    return BadField("tenant", "there is no such tenant", "unknown_tenant")


def limits(own: Quotas, settings: Settings) -> dict[str, int | None]:
    """Every quota as it counts: the tenant's own, else the deployment's."""
    return {name: own[name] if name in own else getattr(settings, f"quota_{name}") for name in QUOTAS}


class Tenants:
    """The operator's view; each call is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, *, weight: float = 1.0, quotas: Quotas | None = None) -> TenantView:
        """Raises `BadField` for a name that is taken, or for values that no tenant can have."""
        check_tenant(name)
        values = {"weight": _weight(weight), "quotas": _checked(quotas or {})}

        times: list[float] = []  # of this call's tries

        def work(connection: Connection) -> TenantView:
            if (known := _find(connection, name)) is not None:
                if known.created_at not in times:
                    raise BadField("tenant", "exists already")
                return _view(known)  # committed before the connection was lost
            times.append(clock(connection))
            connection.execute(insert(Tenant).values(id=name, created_at=times[-1], **values))
            return _view(_find(connection, name))

        return self._database.transact(work)

    def change(
        self,
        name: str,
        *,
        weight: float | None = None,
        quotas: Quotas | None = None,
        unset: frozenset[str] = frozenset(),
    ) -> TenantView:
        """Set what is given; quotas in `unset` go back to the deployment's default. Raises `BadField`."""
        given = _checked(quotas or {})

        def work(connection: Connection) -> TenantView:
            row = _find(connection, name, lock=True)
            if row is None:
                raise unknown_tenant()
            kept = {key: value for key, value in row.quotas.items() if key not in unset}
            connection.execute(
                update(Tenant)
                .where(Tenant.id == name)
                .values(
                    weight=row.weight if weight is None else _weight(weight),
                    quotas=kept | given,
                )
            )
            return _view(_find(connection, name))

        return self._database.transact(work)

    def exists(self, name: str) -> bool:
        with self._database.read() as connection:
            return _find(connection, name) is not None

    def all(self) -> list[TenantView]:
        with self._database.read() as connection:
            rows = connection.execute(select(*Tenant.__table__.columns).order_by(Tenant.id)).all()
        return [_view(row) for row in rows]


def _find(connection: Connection, name: str, *, lock: bool = False) -> Row[tuple[object, ...]] | None:
    query = select(*Tenant.__table__.columns).where(Tenant.id == name)
    # Not FOR UPDATE, which would wait for every insert of a key of this tenant.
    return connection.execute(query.with_for_update(key_share=True) if lock else query).one_or_none()


def _view(row: Row[tuple[object, ...]] | None) -> TenantView:
    assert row is not None
    return TenantView(id=row.id, weight=row.weight, quotas=dict(row.quotas), created_at=row.created_at)


def _weight(weight: float) -> float:
    if not 0.001 <= weight <= 1000:
        raise BadField("weight", "must be a number from 0.001 to 1000")
    return float(weight)


def _checked(quotas: Quotas) -> dict[str, int | None]:
    for name, limit in quotas.items():
        if name not in QUOTAS:
            raise BadField(name, f"is no quota; there are {', '.join(QUOTAS)}")
        if limit is not None and not 0 <= limit <= MAX_QUOTA:
            raise BadField(name, f"must be a whole number from 0 to {MAX_QUOTA}, or none")
    return dict(quotas)
