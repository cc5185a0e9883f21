"""`nightpress`: one command, a subcommand per verb.

Owns the group, and how every command ends when something stands in its way that it has no words for: one line, never
a traceback. The verbs lie in `cli_*` files by noun, and each imports what it needs when it runs, so that `--help`
stays quick.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from api.cli_batch_file import run_batch
from api.cli_client import INTERRUPTED
from api.cli_database import fail
from api.cli_doctor import doctor
from api.cli_jobs import cancel, retry, submit
from api.cli_keys import keys
from api.cli_prices import prices
from api.cli_results import results
from api.cli_schedules import schedule
from api.cli_service import api, migrate, up, worker
from api.cli_status import status
from api.cli_tenants import tenants
from api.cli_usage import usage


class Commands(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        """A disk that is full, a folder that is closed to us, are nobody's mistake in the code."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            what = error.strerror or str(error)
            _drop_output()
            fail(what if error.filename is None else f"{error.filename}: {what}")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("nightpress: interrupted", err=True)
            sys.exit(INTERRUPTED)


def _drop_output() -> None:
    """What standard output did not take would be tried again, and complained about, when the process ends."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nightpress", message="%(prog)s %(version)s")
def main() -> None:
    """Bulk text generation you run yourself.

    Settings come from NIGHTPRESS_… variables; without any, everything lives in ./.nightpress. Exit status: 0
    all well, 1 something failed or cannot be reached, 2 wrong usage, 3 something was cancelled or expired and
    nothing failed, 130 interrupted.
    """


for command in (up, api, worker, migrate, submit, status, results, cancel, retry, usage, schedule, run_batch):
    main.add_command(command)
for command in (keys, tenants, prices, doctor):
    main.add_command(command)


if __name__ == "__main__":
    main(prog_name="nightpress")
