"""What the commands that work on the database directly have in common.

Owns how such a command reaches the database and how it fails: status 1 with one line on standard error. Whoever can
open the database is the operator, so nothing here asks for a key.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from api.cli_settings import load_settings

if TYPE_CHECKING:
    from jobs.database import Database
    from jobs.settings import Settings

data_dir_option = click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Where embedded mode keeps its data."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@contextmanager
def opened(data_dir: Path | None) -> Iterator[tuple[Settings, Database]]:
    """The configured database in its newest shape. What goes wrong inside ends the command politely."""
    settings = load_settings(data_dir=data_dir)
    from sqlalchemy.exc import SQLAlchemyError

    from jobs.bad_field import BadField
    from jobs.database import Database, reason_of
    from migrations.schema import misfit

    path = settings.database_path
    if path is not None and not path.exists():
        fail(f"there is no database at {path}: `nightpress up` and `nightpress migrate` make one")
    database = Database(settings.database, pool_size=1)
    try:
        if (why := misfit(database)) is not None:
            fail(why)
        yield settings, database
    except BadField as error:
        fail(str(error))
    except SQLAlchemyError as error:
        fail(f"the database cannot be used: {reason_of(error)}")
    finally:
        database.close()


def fail(reason: str) -> NoReturn:
    click.echo(f"nightpress: {reason}", err=True)
    sys.exit(1)
