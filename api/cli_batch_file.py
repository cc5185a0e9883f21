"""The command that needs no service: run-batch."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from api.cli_settings import load_settings


def _regular(_: click.Context, __: click.Parameter, path: Path) -> Path:
    """Both files are read again by a run that goes on, which pipes and devices cannot be."""
    if str(path) == "-" or (path.exists() and not path.is_file()):
        raise click.BadParameter(f"{path} is no regular file, which another run could read again")
    return path


@click.command("run-batch", short_help="Run a file of OpenAI batch requests without any service.")
@click.option(
    "-i",
    "--input",
    "source",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_regular,
    help="OpenAI batch lines: custom_id, method, url, body.",
)
@click.option(
    "-o",
    "--output",
    "target",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_regular,
    help="Where results are appended, one line per request, as they finish.",
)
@click.option("--model", help="Folder of safetensors, GGUF file or hub id.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def run_batch(source: Path, target: Path, model: str | None, quiet: bool) -> None:
    """Run a file of OpenAI batch requests on this machine, without any service.

    Started again on the same files, it does only what is missing. Exit status 1 when a request failed, 130 when the
    run was interrupted.
    """
    settings = load_settings(model=model)
    if not settings.model:
        raise click.UsageError("name a model: --model or NIGHTPRESS_MODEL")
    from api.run_batch import run

    sys.exit(run(settings, source, target, quiet=quiet))
