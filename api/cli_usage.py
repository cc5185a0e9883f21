"""`nightpress usage`: what was billed, as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from api.cli_client import client_options, json_option
from api.client import Client

_GROUPS = ("day", "tenant", "model", "key", "batch")
_NAMES = {"key": "key_id", "batch": "batch_id"}  # the answer's words, where they differ
_PAGE = "1000"


@click.command(short_help="Tokens that were billed, and what they cost.")
@click.option(
    "--group-by", "groups", multiple=True, type=click.Choice(_GROUPS), help="A sum each; may be repeated."
)
@click.option("--start", help="From then on: a day of UTC, such as 2026-01-31, or unix seconds.")
@click.option("--end", help="Until then, excluded.")
@click.option("--tenant", help="Another tenant, or * for all; needs the scope admin.")
@json_option
@client_options
def usage(
    groups: tuple[str, ...],
    start: str | None,
    end: str | None,
    tenant: str | None,
    client: Client,
    as_json: bool,
) -> None:
    """Tokens that were billed, what they cost, and what was made beside that.

    Without --group-by one sum of everything. A cost of - means that a model has no price.
    """
    given = {"start": start, "end": end, "tenant": tenant}
    query = [("group_by", group) for group in groups]
    query += [(name, value) for name, value in given.items() if value is not None]
    rows: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        cursor = [] if after is None else [("after", after)]
        page = client.get("v1", "usage", query=[*query, ("limit", _PAGE), *cursor])
        rows += page["data"]
        if (after := page["next"]) is None:
            break
    if as_json:
        click.echo(json.dumps({"object": "list", "data": rows}))
        return
    header = [*groups, "jobs", "prompt", "cached", "completion", "cancelled", "wasted", "cost"]
    for line in table([header, *([*_names(row, groups), *_figures(row)] for row in rows)], len(groups)):
        click.echo(line)


def _names(row: dict[str, Any], groups: Sequence[str]) -> list[str]:
    return [str(row[_NAMES.get(group, group)] or "-") for group in groups]


def _figures(row: dict[str, Any]) -> list[str]:
    billed = row["billed"]
    cost = "-" if row["cost"] is None else f"{row['cost']} {row['currency'] or ''}".rstrip()
    numbers = [row["jobs"], *(billed[f"{name}_tokens"] for name in ("prompt", "cached", "completion"))]
    numbers += [row[kind]["total_tokens"] for kind in ("cancelled", "wasted")]
    return [*(f"{number:,}" for number in numbers), cost]


def table(rows: Sequence[Sequence[str]], num_names: int) -> list[str]:
    """Lines with columns side by side: names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < num_names else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
