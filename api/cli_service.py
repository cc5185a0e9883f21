"""Commands that run the service: up, api, worker, migrate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from api.cli_database import data_dir_option, fail, opened
from api.cli_settings import load_settings

if TYPE_CHECKING:
    from jobs.settings import Settings

model_option = click.option("--model", help="Folder of safetensors, GGUF file or hub id to serve.")
port_option = click.option(
    "--port", type=click.IntRange(0, 65535), help="Port of the API; 0 takes a free one."
)


@click.command()
@data_dir_option
@model_option
@port_option
def up(data_dir: Path | None, model: str | None, port: int | None) -> None:
    """Run everything here: broker, database, API and one worker.

    Prints the address of the API and then `ready`, once the model is loaded. The address is also written to
    the file `url` in the data directory. Ctrl-C lets running jobs finish within the grace period.
    """
    settings = load_settings(data_dir=data_dir, model=model, port=port)
    from engine.checkpoint import is_hub_id

    _require_model(settings)
    if not Path(settings.model).expanduser().exists() and not is_hub_id(settings.model):
        raise click.UsageError(f"{settings.model}: there is no such model")
    from api.supervisor import Supervisor

    sys.exit(Supervisor(settings).run())


@click.command()
@data_dir_option
@click.option("--host", help="Address to bind; loopback only, unless there is an API key.")
@port_option
@click.option("--model", help="What jobs that name no model are for, as workers are given it.")
@click.option(
    "--url-file", type=click.Path(dir_okay=False, path_type=Path), help="Write the address here too."
)
def api(
    data_dir: Path | None, host: str | None, port: int | None, model: str | None, url_file: Path | None
) -> None:
    """Run the HTTP API.

    Without API keys it answers only programs on this machine; see `nightpress keys`.
    """
    settings = load_settings(data_dir=data_dir, host=host, port=port, model=model)
    from api import server

    sys.exit(server.run(settings, url_file))


@click.command()
@data_dir_option
@model_option
def worker(data_dir: Path | None, model: str | None) -> None:
    """Run one worker with its engine. SIGTERM drains it."""
    settings = load_settings(data_dir=data_dir, model=model)
    _require_model(settings)
    with opened(data_dir):  # fails where there is no database of this version
        pass
    from jobs.worker_main import main

    sys.exit(main(settings))


@click.command()
@data_dir_option
def migrate(data_dir: Path | None) -> None:
    """Bring the database to the newest shape. Safe to repeat, and to run several times at once."""
    settings = load_settings(data_dir=data_dir)
    from sqlalchemy.exc import SQLAlchemyError

    from jobs.database import reason_of
    from migrations import upgrade
    from migrations.schema import TooNew

    try:
        upgrade(settings.database)
    except TooNew as error:
        fail(str(error))
    except SQLAlchemyError as error:
        fail(f"migration failed: {type(error).__name__}: {reason_of(error)}")
    click.echo("database is up to date")


def _require_model(settings: Settings) -> None:
    if not settings.model:
        raise click.UsageError("name a model to serve: --model or NIGHTPRESS_MODEL")
