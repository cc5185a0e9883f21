"""`nightpress tenants`: who shares the service, on the database directly.

Owns the commands and what they print.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from api.cli_database import data_dir_option, json_option, opened

if TYPE_CHECKING:
    from jobs.database import Database
    from jobs.settings import Settings
    from jobs.tenants import TenantView


class Limit(click.ParamType[Any]):
    """A quota: a whole number, `none` for no limit, or `default` for what the deployment says."""

    name = "N|none|default"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("none", "default") or isinstance(value, int):
            return value
        if not (value.isascii() and value.isdigit()) or len(value) > 18:
            self.fail(f"{value!r} is neither a whole number nor none nor default", param, ctx)
        return int(value)


def _limits(command: Any) -> Any:
    for name, meaning in (
        ("tokens-per-day", "Most tokens billed per UTC day."),
        ("stored-bytes", "Most bytes of bodies and outputs."),
        ("queued-tokens", "Most estimated tokens of jobs that have not ended."),
        ("queued-jobs", "Most jobs that have not ended."),
    ):
        command = click.option(f"--{name}", type=Limit(), help=meaning)(command)
    return click.option("--weight", type=float, help="Share beside other tenants, 0.001 to 1000.")(command)


@click.group()
def tenants() -> None:
    """Who shares this service, and how much each may use.

    Works on the database directly. A quota is a whole number, `none` for no limit, or `default` for the
    deployment's NIGHTPRESS_QUOTA_… setting.
    """


@tenants.command("create")
@click.argument("name")
@_limits
@data_dir_option
@json_option
def create(name: str, weight: float | None, data_dir: Path | None, as_json: bool, **limits: Any) -> None:
    """Make a tenant. Keys belong to one: `nightpress keys create … --tenant NAME`."""
    from jobs.tenants import Tenants

    given, _ = _split(limits)
    with opened(data_dir) as (settings, database):
        made = Tenants(database).create(name, weight=1.0 if weight is None else weight, quotas=given)
        _show([made], settings, database, as_json=as_json, one=True)


@tenants.command("set")
@click.argument("name")
@_limits
@data_dir_option
@json_option
def change(name: str, weight: float | None, data_dir: Path | None, as_json: bool, **limits: Any) -> None:
    """Change a tenant's weight and quotas; what is not given stays."""
    from jobs.tenants import Tenants

    given, unset = _split(limits)
    with opened(data_dir) as (settings, database):
        changed = Tenants(database).change(name, weight=weight, quotas=given, unset=unset)
        _show([changed], settings, database, as_json=as_json, one=True)


@tenants.command("list")
@data_dir_option
@json_option
def list_tenants(data_dir: Path | None, as_json: bool) -> None:
    """All tenants, with what they use of their quotas."""
    from jobs.tenants import Tenants

    with opened(data_dir) as (settings, database):
        _show(Tenants(database).all(), settings, database, as_json=as_json)


def _split(limits: dict[str, Any]) -> tuple[dict[str, int | None], frozenset[str]]:
    given = {name: None if value == "none" else value for name, value in limits.items() if value is not None}
    unset = frozenset(name for name, value in given.items() if value == "default")
    return {name: value for name, value in given.items() if name not in unset}, unset


def _show(
    found: list[TenantView], settings: Settings, database: Database, *, as_json: bool, one: bool = False
) -> None:
    from jobs.tallies import used
    from jobs.tenants import QUOTAS, limits

    shown: list[dict[str, Any]] = []
    for tenant in found:
        with database.read() as connection:
            use = used(connection, tenant.id)
        effective = limits(tenant.quotas, settings)
        quotas = {name: {"limit": effective[name], "used": getattr(use, name)} for name in QUOTAS}
        shown.append(
            {
                "id": tenant.id,
                "object": "tenant",
                "weight": tenant.weight,
                "created_at": int(tenant.created_at),
                "quotas": quotas,
            }
        )
    if as_json:
        click.echo(json.dumps(shown[0] if one else {"object": "list", "data": shown}))
        return
    for row in shown:
        parts = [f"{row['id']}  weight {row['weight']:g}"]
        for name, numbers in row["quotas"].items():
            limit = "none" if numbers["limit"] is None else numbers["limit"]
            parts.append(f"{name} {numbers['used']} of {limit}")
        click.echo("  ".join(parts))
