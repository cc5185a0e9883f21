"""Tenants: their names, weights and quotas, as the operator sets them."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.bad_field import BadField
from jobs.database import Database
from jobs.settings import Settings
from jobs.tenants import DEFAULT, QUOTAS, Tenants, check_tenant, limits


@pytest.fixture
def tenants(database: Database) -> Tenants:
    return Tenants(database)


def test_there_is_one_from_the_start(tenants: Tenants) -> None:
    (default,) = tenants.all()
    assert (default.id, default.weight, default.quotas) == (DEFAULT, 1.0, {})


def test_what_is_not_given_stays(tenants: Tenants) -> None:
    tenants.create("blog", weight=2.0, quotas={"queued_jobs": 5})
    tenants.change("blog", quotas={"tokens_per_day": None})
    changed = tenants.change("blog", weight=0.5)
    assert (changed.weight, changed.quotas) == (0.5, {"queued_jobs": 5, "tokens_per_day": None})
    changed = tenants.change("blog", quotas={"queued_jobs": 7}, unset=frozenset({"tokens_per_day"}))
    assert (changed.weight, changed.quotas) == (0.5, {"queued_jobs": 7})
    assert [tenant.id for tenant in tenants.all()] == ["blog", DEFAULT]


def test_values_that_no_tenant_can_have(tenants: Tenants) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"weight": 0.0}, "weight"),
        ({"weight": 1e9}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"quotas": {"queued_jobs": -1}}, "queued_jobs"),
        ({"quotas": {"stored_bytes": 2**63}}, "stored_bytes"),
        ({"quotas": {"requests": 1}}, "requests"),
    ]
    for values, param in bad:
        with pytest.raises(BadField) as caught:
            tenants.create("new", **values)
        assert caught.value.param == param
        with pytest.raises(BadField) as caught:
            tenants.change(DEFAULT, **values)
        assert caught.value.param == param
    assert [(tenant.id, tenant.quotas) for tenant in tenants.all()] == [(DEFAULT, {})]


@pytest.mark.parametrize("name", ["", "A", "-a", "a b", "a" * 64, "a\n", "é", "a/b", None, 1])
def test_names_that_no_tenant_can_have(name: Any) -> None:
    with pytest.raises(BadField) as caught:
        check_tenant(name)
    assert caught.value.param == "tenant"


def test_a_name_is_taken_once(tenants: Tenants) -> None:
    with pytest.raises(BadField, match="must be 1 to 63"):
        tenants.create("A B")
    with pytest.raises(BadField, match="exists"):
        tenants.create(DEFAULT)
    with pytest.raises(BadField, match="no such tenant"):
        tenants.change("nobody", weight=1.0)


def test_limits_are_the_tenants_own_and_then_the_settings() -> None:
    settings = Settings(quota_queued_jobs=10, quota_stored_bytes=20)
    assert limits({}, settings) == {
        "queued_jobs": 10,
        "queued_tokens": None,
        "stored_bytes": 20,
        "tokens_per_day": None,
    }
    assert limits({"queued_jobs": None, "stored_bytes": 0}, settings)["queued_jobs"] is None
    assert limits({"queued_jobs": None, "stored_bytes": 0}, settings)["stored_bytes"] == 0
    assert tuple(limits({}, settings)) == QUOTAS
