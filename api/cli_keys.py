"""`nightpress keys`: make, list, rotate and end API keys, on the database directly.

Owns what these commands print. A key's text goes to standard output alone and once, so that a script can keep it:
`KEY=$(nightpress keys create nightly)`; everything that is said about it goes to standard error.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from api.cli_database import data_dir_option, fail, json_option, opened

if TYPE_CHECKING:
    from jobs.key_text import KeyText
    from jobs.keys import KeyView

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType[float]):
    """`90s`, `30m`, `12h` or `90d`, in seconds."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d{1,9})([smhd])", value) if isinstance(value, str) else None
        if found is None:
            self.fail(f"{value!r} is no duration; write it like 90s, 30m, 12h or 90d", param, ctx)
        return float(int(found[1]) * _UNITS[found[2]])


@click.group()
def keys() -> None:
    """API keys. The first one closes the door: from then on every request needs a key.

    Works on the database directly. What is changed here acts within a few seconds in every running API.
    """


@keys.command("create")
@click.argument("name")
@click.option("--tenant", default="default", show_default=True, help="Whose key it is.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["read", "submit", "admin"]),
    multiple=True,
    help="What it may do; may be repeated. admin means all. Without any: read and submit.",
)
@click.option(
    "--expires-in", "life", type=Duration(), help="How long it lives, like 90d; otherwise for ever."
)
@click.option("--if-none", "unless_any", is_flag=True, help="Only if there is no key at all yet.")
@data_dir_option
@json_option
def create(
    name: str,
    tenant: str,
    scopes: tuple[str, ...],
    life: float | None,
    unless_any: bool,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Make a key called NAME and print it. Nobody can print it again."""
    from jobs.keys import Keys, Scope

    wanted = [Scope(word) for word in scopes or ("read", "submit")]
    with opened(data_dir) as (_, database):
        made = Keys(database).create(
            tenant=tenant, name=name, scopes=wanted, life=life, unless_any=unless_any
        )
    if made is None:
        click.echo("there is a key already; nothing was made", err=True)
        return
    view, text = made
    _hand_over(view, text, as_json=as_json)


@keys.command("list")
@click.option("--tenant", help="Only this tenant's.")
@data_dir_option
@json_option
def list_keys(tenant: str | None, data_dir: Path | None, as_json: bool) -> None:
    """All keys, dead ones too, without their texts."""
    from jobs.keys import Keys

    with opened(data_dir) as (_, database):
        found = Keys(database).all(tenant)
    if as_json:
        click.echo(json.dumps({"object": "list", "data": [_object(view) for view in found]}))
        return
    if not found:
        click.echo("there is no key yet" if tenant is None else f"{tenant} has no key", err=True)
    for view in found:
        click.echo(_line(view))


@keys.command("rotate", short_help="Make a second key like ID and print it; ID ends later.")
@click.argument("key_id", metavar="ID")
@click.option(
    "--overlap", type=Duration(), default="24h", show_default=True, help="How long the old key still works."
)
@data_dir_option
@json_option
def rotate(key_id: str, overlap: float, data_dir: Path | None, as_json: bool) -> None:
    """Make a second key like ID and print it; ID itself ends after the overlap."""
    from jobs.keys import Keys, UnknownKey

    with opened(data_dir) as (_, database):
        try:
            view, text, old = Keys(database).rotate(key_id, overlap=overlap)
        except UnknownKey:
            fail(f"there is no key {key_id[:80]!a}")
    _hand_over(view, text, as_json=as_json, replaces=old)


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@data_dir_option
@json_option
def revoke(key_id: str, data_dir: Path | None, as_json: bool) -> None:
    """End the key ID now. It stops working within a few seconds."""
    from jobs.keys import Keys, UnknownKey

    with opened(data_dir) as (_, database):
        try:
            view = Keys(database).revoke(key_id)
        except UnknownKey:
            fail(f"there is no key {key_id[:80]!a}")
    click.echo(json.dumps(_object(view)) if as_json else _line(view))


def _hand_over(view: KeyView, text: KeyText, *, as_json: bool, replaces: KeyView | None = None) -> None:
    if as_json:
        more = {} if replaces is None else {"replaces": _object(replaces)}
        click.echo(json.dumps(_object(view) | {"key": text.text} | more))
        return
    click.echo(_line(view), err=True)
    if replaces is not None:
        click.echo(f"{_line(replaces)}: this one ends", err=True)
    click.echo("this is the only time that the key is shown:", err=True)
    click.echo(text.text)


def _object(view: KeyView) -> dict[str, Any]:
    return {
        "id": view.id,
        "object": "key",
        "tenant": view.tenant,
        "name": view.name,
        "scopes": list(view.scopes),
        "status": view.status,
        "created_at": int(view.created_at),
        "expires_at": _seconds(view.expires_at),
        "revoked_at": _seconds(view.revoked_at),
        "last_used_at": _seconds(view.last_used_at),
    }


def _line(view: KeyView) -> str:
    left = view.seconds_left
    ends = f", for {left / 86_400:.1f} more days" if view.status == "live" and left is not None else ""
    return f"{view.id}  {view.tenant}  {view.name}  {' '.join(view.scopes)}  {view.status}{ends}"


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)
