"""Idempotency: a submit that comes a second time is answered as before, and accepted once.

Owns the table of keys that clients give to their submits (draft-ietf-httpapi-idempotency-key-header-07) and the
comparison of what was sent under them. A key is the tenant's own and stays as long as what it made. It is
written in the transaction that accepts the work, so of concurrent copies one is accepted and the others wait for it,
and a submit that is refused uses up no key. Refuses to know HTTP.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, select

from jobs.bad_field import BadField
from jobs.dialects import insert_into, now
from jobs.models import IdempotencyKey

MAX_KEY_CHARS: Final = 255


class KeyReusedError(Exception):
    """The key came before, with something else."""

    code = "idempotency_key_reused"
    message = "this Idempotency-Key was used for another request; give every request a key of its own"


@dataclass(frozen=True, slots=True)
class Submit:
    """A client's name for one submit. `fingerprint`: 64 hex digits of what was sent."""

    key: str
    fingerprint: str

    @classmethod
    def of(cls, key: str, body: object) -> Submit:
        """`body`: JSON as it was parsed; the order of names does not matter. Raises `BadField`."""
        if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
            raise BadField(
                "idempotency-key",
                f"must be 1 to {MAX_KEY_CHARS} printable ASCII characters",
                "invalid_header",
            )
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return cls(key, hashlib.sha256(text.encode()).hexdigest())


def known_target(connection: Connection, submit: Submit, *, tenant: str) -> str | None:
    """The id of what an earlier submit was accepted as; None for one that is new. Ask it before anything is judged
    that time may change. Raises `KeyReusedError`."""
    row = connection.execute(
        select(IdempotencyKey.fingerprint, IdempotencyKey.target).where(
            IdempotencyKey.tenant == tenant, IdempotencyKey.key == submit.key
        )
    ).one_or_none()
    if row is not None and row.fingerprint != submit.fingerprint:
        raise KeyReusedError
    return None if row is None else str(row.target)


def earlier_target(connection: Connection, submit: Submit | None, *, tenant: str, target: str) -> str | None:
    """The id of what an earlier copy of `submit` was accepted as. None for the first one, which stands for `target`
    from now on and is to be accepted, as is a submit that has no name.

    Waits for a transaction that holds the same key. Raises `KeyReusedError`.
    """
    if submit is None:
        return None
    connection.execute(
        insert_into(connection, IdempotencyKey)
        .values(
            tenant=tenant, key=submit.key, fingerprint=submit.fingerprint, target=target, created_at=now()
        )
        .on_conflict_do_nothing()
    )
    known = known_target(connection, submit, tenant=tenant)
    assert known is not None
    return None if known == target else known
