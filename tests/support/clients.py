"""HTTP clients of an application in this process: as a program on this machine would reach it, or with a key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from jobs.database import Database
from jobs.keys import Keys, Scope
from jobs.tenants import Tenants


def local_client(app: FastAPI, **options: Any) -> TestClient:
    """From a loopback address, under a loopback name."""
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50_000), **options)


def key_of(database: Database, tenant: str, *scopes: Scope, life: float | None = None) -> str:
    """The text of a new key; the tenant is made if there is none. Without scopes it may read and submit."""
    tenants = Tenants(database)
    if tenant not in {one.id for one in tenants.all()}:
        tenants.create(tenant)
    made = Keys(database).create(
        tenant=tenant, name="test", scopes=scopes or (Scope.READ, Scope.SUBMIT), life=life
    )
    assert made is not None
    return made[1].text


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
