"""Keys in SQL: never their text, ended in time, rotated without a gap."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, text, update

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.dialects import now
from jobs.keys import ALL_SCOPES, Keys, Scope, UnknownKey
from jobs.models import Base, Key
from jobs.tenants import DEFAULT, Tenants

BOTH = (Scope.READ, Scope.SUBMIT)


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


def make(keys: Keys, *scopes: Scope, tenant: str = DEFAULT, life: float | None = None) -> tuple[str, str]:
    """Id and text of a new key."""
    made = keys.create(tenant=tenant, name="nightly", scopes=scopes or BOTH, life=life)
    assert made is not None
    return made[0].id, made[1].text


def status(keys: Keys, key_id: str) -> str:
    found = keys.find(key_id)
    assert found is not None
    return found.view.status


def age(database: Database, key_id: str, seconds: float) -> None:
    """Let so much time pass for one key."""
    with database.write() as connection:
        connection.execute(
            update(Key)
            .where(Key.id == key_id)
            .values(created_at=Key.created_at - seconds, expires_at=Key.expires_at - seconds)
        )


def everything(database: Database) -> str:
    """All that the database holds, as text."""
    with database.read() as connection:
        return "\n".join(
            str(tuple(row))
            for table in Base.metadata.sorted_tables
            for row in connection.execute(select(table))
        )


def test_a_key_is_stored_without_its_text(database: Database, keys: Keys) -> None:
    assert not keys.any()
    key_id, key = make(keys)
    assert keys.any()
    found = keys.find(key_id)
    assert found is not None
    assert (found.view.tenant, found.view.name, found.view.scopes) == (DEFAULT, "nightly", BOTH)
    assert (found.view.expires_at, found.view.revoked_at, found.view.last_used_at) == (None, None, None)
    assert (found.view.status, found.granted) == ("live", frozenset(BOTH))
    held = everything(database)
    assert key_id in held
    assert found.hash in held
    assert key not in held
    assert key[16:59] not in held, "the secret"
    assert keys.find("key_unknown") is None


def test_scopes(keys: Keys) -> None:
    assert keys.find(make(keys, Scope.READ)[0]).granted == {Scope.READ}  # type: ignore[union-attr]
    assert keys.find(make(keys, Scope.ADMIN)[0]).granted == ALL_SCOPES  # type: ignore[union-attr]


def test_values_that_no_key_can_have(keys: Keys) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"tenant": "nobody"}, "tenant"),
        ({"scopes": ()}, "scopes"),
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"life": 0.0}, "expires_in"),
        ({"life": 1e12}, "expires_in"),
    ]
    for values, param in bad:
        with pytest.raises(BadField) as caught:
            keys.create(**{"tenant": DEFAULT, "name": "x", "scopes": BOTH, **values})
        assert caught.value.param == param
    assert not keys.any()


def test_a_key_ends_when_its_time_is_over(database: Database, keys: Keys) -> None:
    key_id, _ = make(keys, life=3600.0)
    assert status(keys, key_id) == "live"
    age(database, key_id, 3599.0)
    assert status(keys, key_id) == "live"
    age(database, key_id, 2.0)
    assert status(keys, key_id) == "expired"
    assert keys.any(), "a dead key still closes the door"


def test_a_revoked_key_stays_revoked(keys: Keys) -> None:
    key_id, _ = make(keys)
    first = keys.revoke(key_id)
    assert first.status == "revoked"
    assert keys.revoke(key_id) == first
    assert keys.any()
    with pytest.raises(UnknownKey):
        keys.revoke("key_unknown")


def test_a_rotation_leaves_two_keys_for_a_while(database: Database, keys: Keys) -> None:
    old_id, old_text = make(keys, Scope.READ, life=86_400.0)
    made, key, old = keys.rotate(old_id, overlap=3600.0)
    assert key.text != old_text
    assert (made.tenant, made.name, made.scopes, made.status) == (DEFAULT, "nightly", (Scope.READ,), "live")
    assert made.seconds_left == pytest.approx(86_400, abs=60), "as long a life as the old one had"
    assert old.id == old_id
    assert old.seconds_left == pytest.approx(3600, abs=60)
    assert (status(keys, old_id), status(keys, made.id)) == ("live", "live")
    age(database, old_id, 3700.0)
    assert (status(keys, old_id), status(keys, made.id)) == ("expired", "live")
    with pytest.raises(BadField, match="expired"):
        keys.rotate(old_id, overlap=0.0)


def test_a_rotation_never_lengthens_a_life(keys: Keys) -> None:
    key_id, _ = make(keys, life=60.0)
    assert keys.rotate(key_id, overlap=86_400.0)[2].seconds_left == pytest.approx(60, abs=30)
    forever, _ = make(keys)
    made, _, old = keys.rotate(forever, overlap=0.0)
    assert (made.expires_at, old.status) == (None, "expired")
    keys.revoke(made.id)
    with pytest.raises(BadField, match="revoked"):
        keys.rotate(made.id, overlap=0.0)
    with pytest.raises(UnknownKey):
        keys.rotate("key_unknown", overlap=0.0)


def test_the_first_key_is_made_once(database: Database, keys: Keys) -> None:
    def first(_: int) -> bool:
        made = Keys(database).create(tenant=DEFAULT, name="first", scopes=BOTH, unless_any=True)
        return made is not None

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(first, range(4))) == [False, False, False, True]
    assert len(keys.all(None)) == 1


def test_lists_are_by_tenant(database: Database, keys: Keys) -> None:
    Tenants(database).create("other")
    mine, theirs = make(keys)[0], make(keys, tenant="other")[0]
    assert [key.id for key in keys.all(DEFAULT)] == [mine]
    assert [key.id for key in keys.all("other")] == [theirs]
    assert {key.id for key in keys.all(None)} == {mine, theirs}


def test_a_use_is_noted_once_a_minute(database: Database, keys: Keys) -> None:
    key_id, _ = make(keys)

    def last_use() -> float | None:
        with database.read() as connection:
            return connection.scalars(select(Key.last_used_at).where(Key.id == key_id)).one()

    keys.note_use(key_id)
    first = last_use()
    assert first is not None
    keys.note_use(key_id)
    assert last_use() == first
    with database.write() as connection:
        connection.execute(update(Key).values(last_used_at=now() - 61))
    keys.note_use(key_id)
    assert (last_use() or 0.0) >= first


def test_a_use_that_cannot_be_noted_is_no_failure(
    database: Database, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    key_id, _ = make(keys)
    with database.write() as connection:
        connection.execute(text("ALTER TABLE keys RENAME COLUMN last_used_at TO gone"))
    keys.note_use(key_id)
    assert "keys.use_not_noted" in caplog.text
