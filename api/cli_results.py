"""`nightpress results`: what came out of a batch, as JSON lines, once or while it comes.

Owns the file: it appears under its name when it is whole, so that nobody takes half a night for all of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click

from api.cli_client import client_options, exit_status, patiently, progress
from api.cli_database import fail
from api.cli_status import wait
from api.client import Client


@click.command()
@click.argument("batch")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    default="-",
    help="Where to write; it is replaced when all is there. Otherwise standard output.",
)
@click.option(
    "--order",
    type=click.Choice(["input", "completion"]),
    help="Otherwise input, and completion with --follow.",
)
@click.option("--follow", is_flag=True, help="Go on until the batch has closed.")
@click.option(
    "--interval",
    type=click.FloatRange(0.05, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between looks.",
)
@click.option("--json", "as_json", is_flag=True, help="Changes nothing: lines are JSON.")
@client_options
def results(
    batch: str,
    output: Path,
    order: str | None,
    follow: bool,
    interval: float,
    client: Client,
    as_json: bool,
) -> None:
    """The ended jobs of a BATCH, one JSON object per line.

    In input order --follow waits for the last job before it writes the first. Exit status 1 when a job failed, 3 when
    none did but one was cancelled or expired. That jobs are still open is said on standard error.
    """
    if batch.startswith("job_"):
        raise click.UsageError(f"{batch} is a job: `nightpress status {batch}` shows what came out of it")
    order = order or ("completion" if follow else "input")
    states: Counter[str] = Counter()
    with _opened(output) as file:
        if follow and order == "input":
            wait(client, batch, client.get("v1", "batches", batch), interval)
        lines = (
            _whole(client, batch) if order == "input" else _pages(client, batch, interval if follow else None)
        )
        incomplete = False
        for line in lines:
            if line is None:
                incomplete = True
                break
            file.write(line)
            if follow:
                file.flush()  # whoever reads along waits for each
            states[json.loads(line)["status"]] += 1
    if incomplete:
        click.echo("nightpress: the batch is still running, more will follow", err=True)
    sys.exit(exit_status(states))


def _whole(client: Client, batch: str) -> Iterator[bytes | None]:
    """Lines in input order, and None if more will follow."""
    with client.lines("v1", "batches", batch, "results") as answer:
        yield from answer.lines
        if answer.incomplete:
            yield None


def _pages(client: Client, batch: str, interval: float | None) -> Iterator[bytes | None]:
    """Lines in the order of completion; without an `interval` those that are there, and None if more will follow."""
    after = "0"
    with progress(batch, None, wanted=interval is not None) as bar:
        while True:
            lines, following, more = patiently(lambda after=after: _page(client, batch, after))  # type: ignore[misc]
            bar.update(len(lines))
            yield from lines
            if not more:
                return
            if following == after:  # nothing new
                if interval is None:
                    yield None
                    return
                time.sleep(interval)
            after = following


def _page(client: Client, batch: str, after: str) -> tuple[list[bytes], str, bool]:
    query = [("order", "completion"), ("after", after)]
    with client.lines("v1", "batches", batch, "results", query=query) as answer:
        return list(answer.lines), answer.next or after, answer.incomplete


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place at the end; standard output and devices as they are."""
    if str(path) == "-":
        if sys.stdout is None:
            fail("standard output is closed")
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise click.FileError(str(path), error.strerror or str(error)) from None
    finally:
        part.unlink(missing_ok=True)
