"""Keys: who may ask, for which tenant, and for what.

Owns the keys table: making, ending, rotating and finding keys. A key's text leaves this file once, when the key is
made; what stays is a hash (`jobs.key_text`). A key is dead when it was revoked or its time is over, both on the
database's clock. Rows are never deleted, so "there is a key" can only become true, and a service whose keys are all
dead is closed, not open. Refuses to know HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection, Row, Select, case, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from jobs.bad_field import BadField
from jobs.database import Database, cause
from jobs.dialects import now
from jobs.key_text import KeyText, new_key
from jobs.models import Key, Tenant
from jobs.tenants import unknown_tenant

log = logging.getLogger(__name__)

MAX_NAME_CHARS: Final = 100
MAX_LIFE_SECONDS: Final = 100 * 365 * 86_400.0
USE_SECONDS: Final = 60.0  # how exact `last_used_at` is
_USE_PATIENCE: Final = 1.0


class Scope(StrEnum):
    READ = "read"  # ask for jobs, batches and results
    SUBMIT = "submit"  # hand in and cancel
    ADMIN = "admin"  # both, and whatever is neither

    @property
    def grants(self) -> frozenset[Scope]:
        return frozenset(Scope) if self is Scope.ADMIN else frozenset({self})


ALL_SCOPES: Final = frozenset(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyView:
    """A key as it may be shown. Times in unix seconds; `seconds_left` None: it does not end by itself."""

    id: str
    tenant: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    seconds_left: float | None

    @property
    def status(self) -> str:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.seconds_left is not None and self.seconds_left <= 0 else "live"


@dataclass(frozen=True, slots=True)
class FoundKey:
    """What the door needs of a key: `hash` to compare with, and what the key may do."""

    view: KeyView
    hash: str
    granted: frozenset[Scope]


class UnknownKey(LookupError):
    """There is no key with this id."""


class Keys:
    """Each call is one short transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def any(self) -> bool:
        """Whether there is a key at all, live or dead. Once true, always true."""
        with self._database.read() as connection:
            return connection.scalars(select(Key.id).limit(1)).first() is not None

    def find(self, key_id: str) -> FoundKey | None:
        with self._database.read() as connection:
            row = connection.execute(_keys(Key.hash).where(Key.id == key_id)).one_or_none()
        if row is None:
            return None
        view = _view(row)
        granted = frozenset[Scope]().union(*(scope.grants for scope in view.scopes))
        return FoundKey(view, row.hash, granted)

    def all(self, tenant: str | None) -> list[KeyView]:
        """Oldest first; None: of every tenant."""
        query = _keys().order_by(Key.tenant, Key.created_at, Key.id)
        if tenant is not None:
            query = query.where(Key.tenant == tenant)
        with self._database.read() as connection:
            return [_view(row) for row in connection.execute(query)]

    def create(
        self,
        *,
        tenant: str,
        name: str,
        scopes: Iterable[Scope],
        life: float | None = None,
        unless_any: bool = False,
    ) -> tuple[KeyView, KeyText] | None:
        """A new key and its text, which nobody can show again. `life` in seconds. None when `unless_any` and
        there is a key already. Raises `BadField`."""
        if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise BadField("name", f"must be 1 to {MAX_NAME_CHARS} printable characters")
        ordered = tuple(sorted(set(scopes)))
        if not ordered:
            raise BadField("scopes", "at least one scope is required")
        if life is not None and not 0 < life <= MAX_LIFE_SECONDS:
            raise BadField("expires_in", "must be more than 0 seconds and at most 100 years")
        key = new_key()

        def work(connection: Connection) -> KeyView | None:
            # The tenant's lock puts two first keys in an order.
            known = select(Tenant.id).where(Tenant.id == tenant).with_for_update(key_share=True)
            if connection.scalars(known).first() is None:
                raise unknown_tenant()
            if unless_any and connection.scalars(select(Key.id).where(Key.id != key.id).limit(1)).first():
                return None
            return _insert(connection, key, tenant=tenant, name=name, scopes=ordered, life=life)

        made = self._database.transact(work)
        return None if made is None else (made, key)

    def rotate(self, key_id: str, *, overlap: float) -> tuple[KeyView, KeyText, KeyView]:
        """A second key like this one, which itself ends `overlap` seconds from now, or earlier if it was to.

        Returns the new key, its text, and the old key. A key that was made to live for a time gives its
        successor the same length of life. Raises `UnknownKey`, and `BadField` for a key that is dead.
        """
        if not 0 <= overlap <= MAX_LIFE_SECONDS:
            raise BadField("overlap", "must be from 0 seconds to 100 years")
        key = new_key()

        def work(connection: Connection) -> tuple[KeyView, KeyView]:
            old = _lock(connection, key_id)
            if (done := connection.execute(_keys().where(Key.id == key.id)).one_or_none()) is not None:
                return _view(done), old  # this very transaction was committed before
            if old.status != "live":
                raise BadField("key", f"is {old.status}; make a new one instead")
            life = None if old.expires_at is None else old.expires_at - old.created_at
            made = _insert(connection, key, tenant=old.tenant, name=old.name, scopes=old.scopes, life=life)
            end = now() + overlap
            connection.execute(
                update(Key)
                .where(Key.id == key_id)
                .values(expires_at=case((Key.expires_at < end, Key.expires_at), else_=end))
            )
            return made, _lock(connection, key_id)

        made, old = self._database.transact(work)
        return made, key, old

    def revoke(self, key_id: str) -> KeyView:
        """End a key now; a second call changes nothing. Raises `UnknownKey`."""

        def work(connection: Connection) -> KeyView:
            _lock(connection, key_id)
            connection.execute(
                update(Key).where(Key.id == key_id, Key.revoked_at.is_(None)).values(revoked_at=now())
            )
            return _lock(connection, key_id)

        return self._database.transact(work)

    def note_use(self, key_id: str) -> None:
        """Remember that a key was used just now. Never raises: an answer does not depend on it."""

        def work(connection: Connection) -> None:
            old = or_(Key.last_used_at.is_(None), Key.last_used_at < now() - USE_SECONDS)
            connection.execute(update(Key).where(Key.id == key_id, old).values(last_used_at=now()))

        try:
            self._database.transact(work, patience=_USE_PATIENCE)
        except SQLAlchemyError as error:
            log.warning("keys.use_not_noted key=%s error=%s", key_id, cause(error))


def _insert(
    connection: Connection,
    key: KeyText,
    *,
    tenant: str,
    name: str,
    scopes: tuple[Scope, ...],
    life: float | None,
) -> KeyView:
    known = connection.execute(_keys().where(Key.id == key.id)).one_or_none()
    if known is not None:  # this very transaction was committed before its connection was lost
        return _view(known)
    connection.execute(
        insert(Key).values(
            id=key.id,
            tenant=tenant,
            name=name,
            hash=key.hash,
            scopes=" ".join(scopes),
            created_at=now(),
            expires_at=None if life is None else now() + life,
        )
    )
    return _view(connection.execute(_keys().where(Key.id == key.id)).one())


def _lock(connection: Connection, key_id: str) -> KeyView:
    row = connection.execute(_keys().where(Key.id == key_id).with_for_update()).one_or_none()
    if row is None:
        raise UnknownKey(key_id)
    return _view(row)


def _keys(*more: Any) -> Select[Any]:
    return select(
        *(Key.id, Key.tenant, Key.name, Key.scopes, Key.created_at, Key.expires_at, Key.revoked_at),
        Key.last_used_at,
        (Key.expires_at - now()).label("seconds_left"),
        *more,
    )


def _view(row: Row[Any]) -> KeyView:
    return KeyView(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        scopes=tuple(Scope(word) for word in row.scopes.split()),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        seconds_left=row.seconds_left,
    )
