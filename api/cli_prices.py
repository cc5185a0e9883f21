"""`nightpress prices`: what tokens cost, on the database directly, by whoever runs the service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from api.cli_database import data_dir_option, json_option, opened
from api.cli_usage import table

if TYPE_CHECKING:
    from jobs.prices import PriceView


@click.group()
def prices() -> None:
    """What a million tokens of a model cost, and since when.

    Works on the database directly. Amounts are exact decimals. A price holds until the model's next one begins, and
    does not change once it has begun.
    """


@prices.command("set")
@click.argument("model")
@click.option("--prompt", required=True, help="Per million prompt tokens.")
@click.option("--completion", required=True, help="Per million completion tokens.")
@click.option("--cached-prompt", help="Per million prompt tokens that were cached; otherwise as --prompt.")
@click.option("--currency", required=True, help="Three letters, such as EUR; the same for all prices.")
@click.option("--from", "start", help="When it begins: a day of UTC or unix seconds. Otherwise now.")
@data_dir_option
@json_option
def change(
    model: str,
    prompt: str,
    completion: str,
    cached_prompt: str | None,
    currency: str,
    start: str | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Give MODEL a price. In the past only if it has none yet."""
    from jobs.moments import parse_moment
    from jobs.prices import Prices

    with opened(data_dir) as (_, database):
        made = Prices(database).set(
            model,
            prompt=prompt,
            completion=completion,
            cached_prompt=cached_prompt,
            currency=currency,
            valid_from=None if start is None else parse_moment("from", start),
        )
        click.echo(json.dumps(_object(made)) if as_json else "\n".join(_table([made])))


@prices.command("list")
@data_dir_option
@json_option
def list_prices(data_dir: Path | None, as_json: bool) -> None:
    """All prices, by model and start."""
    from jobs.prices import Prices

    with opened(data_dir) as (_, database):
        found = Prices(database).all()
        if as_json:
            click.echo(json.dumps({"object": "list", "data": [_object(price) for price in found]}))
        else:
            click.echo("\n".join(_table(found)))


def _object(price: PriceView) -> dict[str, Any]:
    from jobs.prices import amount_text

    return {
        "object": "price",
        "model": price.model,
        "valid_from": price.valid_from,
        "currency": price.currency,
        "prompt": amount_text(price.prompt),
        "cached_prompt": amount_text(price.cached_prompt),
        "completion": amount_text(price.completion),
    }


def _table(found: list[PriceView]) -> list[str]:
    import datetime

    header = ["model", "from (UTC)", "prompt", "cached", "completion", "currency"]
    rows = [header]
    for price in found:
        shown = _object(price)
        start = datetime.datetime.fromtimestamp(price.valid_from, datetime.UTC)
        amounts = [shown[name] for name in ("prompt", "cached_prompt", "completion")]
        rows.append([price.model, f"{start:%Y-%m-%d %H:%M}", *amounts, price.currency])
    return table(rows, 2)
