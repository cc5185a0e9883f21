"""`nightpress doctor`: what is wrong, or missing, before it is met at night."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from api.cli_database import data_dir_option, json_option
from api.cli_settings import load_settings

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


@click.command(short_help="Say what is wrong with a deployment.")
@data_dir_option
@click.option("--model", help="Look at this model instead of NIGHTPRESS_MODEL.")
@json_option
def doctor(data_dir: Path | None, model: str | None, as_json: bool) -> None:
    """Look at database, broker, files, model and device, and say what is wrong with them.

    Changes nothing. Exit status 1 if something failed; warnings are none. The first time, kernels may have to be
    compiled, which takes a moment.
    """
    settings = load_settings(data_dir=data_dir, model=model)
    from api.checkup import Verdict, checkup

    found = []
    for finding in checkup(settings):
        found.append(finding)
        if not as_json:
            verdict = click.style(f"{finding.verdict:<8}", fg=_COLOURS[finding.verdict])
            click.echo(f"{verdict} {finding.part:<9} {finding.says}")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found]))
    sys.exit(1 if any(finding.verdict is Verdict.FAILED for finding in found) else 0)
