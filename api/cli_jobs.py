"""Commands for those who have work: submit, status, results, cancel. All speak HTTP to a running API."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import IO, Any

import click

from api.cli_settings import load_settings
from api.client import Client, ClientError

JOBS_PER_BATCH = 10_000  # what POST /v1/jobs takes at once
BYTES_PER_BATCH = 32_000_000  # of lines, well below the limit of an array's body

url_option = click.option(
    "--url", help="Address of the API; otherwise the one of `nightpress up`, or the port."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the API's own objects.")


def _client(url: str | None) -> Client:
    if url is None:
        settings = load_settings()
        beside = settings.data_dir / "url"
        url = beside.read_text().strip() if beside.is_file() else f"http://{settings.host}:{settings.port}"
    if not url.startswith(("http://", "https://")):
        raise click.UsageError(f"--url: {url} must start with http:// or https://")
    return Client(url)


def _fails_politely(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ClientError as error:
            click.echo(f"nightpress: {error}", err=True)
            sys.exit(1)

    return run


@click.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--prompt", "prompts", multiple=True, help="A prompt instead of a file; may be repeated.")
@click.option("--model", help="Model of the jobs of --prompt.")
@click.option("--max-tokens", type=int, help="Limit of the jobs of --prompt.")
@url_option
@json_option
@_fails_politely
def submit(
    file: IO[bytes] | None,
    prompts: tuple[str, ...],
    model: str | None,
    max_tokens: int | None,
    url: str | None,
    as_json: bool,
) -> None:
    """Hand in jobs and print the id of the job or the batch.

    FILE (or - for standard input) holds one JSON job, `{"jobs": […]}`, an array of jobs, or one job per line.
    More jobs than one batch takes become several batches.
    """
    if (file is None) == (not prompts):
        raise click.UsageError("give a FILE, or - for standard input, or --prompt")
    if file is not None and (model is not None or max_tokens is not None):
        raise click.UsageError("--model and --max-tokens belong to --prompt; jobs of a FILE name their own")
    if file is None:
        options = {"model": model, "max_tokens": max_tokens}
        given = {name: value for name, value in options.items() if value is not None}
        jobs = [{"prompt": prompt, **given} for prompt in prompts]
        bodies = iter([jobs[0] if len(jobs) == 1 else {"jobs": jobs}])
    else:
        bodies = _bodies(file)
    client = _client(url)
    for body in bodies:
        made = client.post("v1", "jobs", body=body)
        click.echo(json.dumps(made) if as_json else made["id"])


@click.command()
@click.argument("name", metavar="ID")
@url_option
@json_option
@_fails_politely
def status(name: str, url: str | None, as_json: bool) -> None:
    """How far a job or a batch is. Exit status 1 when it failed, wholly or in part."""
    client = _client(url)
    found = client.get("v1", _plural(name), name)
    if as_json:
        click.echo(json.dumps(found))
    elif found["object"] == "batch":
        counts = ", ".join(f"{number} {state}" for state, number in found["job_counts"].items() if number)
        usage = found["usage"]
        click.echo(f"{found['id']}  {found['status']}  {found['request_counts']['total']} jobs: {counts}")
        click.echo(f"  tokens: {usage['input_tokens']} in, {usage['output_tokens']} out")
    else:
        click.echo(f"{found['id']}  {found['status']}  attempts: {found['attempts']}")
        if found["error"]:
            click.echo(f"  {found['error']['code']}: {found['error']['message']}")
        for output in found["outputs"] or ():
            click.echo(output["text"])
    failed = found["request_counts"]["failed"] if found["object"] == "batch" else found["status"] == "failed"
    sys.exit(1 if failed else 0)


@click.command()
@click.argument("batch")
@click.option("-o", "--output", type=click.File("wb"), default="-", help="Where to write; standard output.")
@url_option
@_fails_politely
def results(batch: str, output: IO[bytes], url: str | None) -> None:
    """The finished jobs of a BATCH, one JSON object per line, in input order.

    Exit status 1 when one of them failed. Jobs still open are named on standard error.
    """
    failed = False
    with _client(url).lines("v1", "batches", batch, "results") as (incomplete, lines):
        for line in lines:
            output.write(line)
            failed = failed or json.loads(line)["status"] == "failed"
    output.flush()
    if incomplete:
        click.echo("nightpress: the batch is still running, more will follow", err=True)
    sys.exit(1 if failed else 0)


@click.command()
@click.argument("name", metavar="ID")
@url_option
@json_option
@_fails_politely
def cancel(name: str, url: str | None, as_json: bool) -> None:
    """Cancel a job, or all open jobs of a batch."""
    found = _client(url).post("v1", _plural(name), name, "cancel")
    click.echo(json.dumps(found) if as_json else f"{found['id']}  {found['status']}")


def _plural(name: str) -> str:
    return "batches" if name.startswith("batch_") else "jobs"


def _bodies(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Bodies of POST /v1/jobs: one for JSON, as many as are needed for lines."""
    text = file.read()
    name = getattr(file, "name", "<stdin>")
    if not text.strip():
        raise click.UsageError(f"{name}: holds no job")
    try:
        data = json.loads(text)
    except UnicodeDecodeError:
        raise click.UsageError(f"{name}: is not UTF-8") from None
    except ValueError:
        yield from _batches(name, text)
        return
    if isinstance(data, list):
        data = {"jobs": data}
    if not isinstance(data, dict):
        raise click.UsageError(f"{name}: must hold a job, an array of jobs, or one job per line")
    yield data


def _batches(name: str, text: bytes) -> Iterator[dict[str, Any]]:
    jobs: list[Any] = []
    lines = [(number, line) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    for number, line in lines:  # all of them, before the first is sent
        try:
            jobs.append(json.loads(line))
        except ValueError as error:
            raise click.UsageError(f"{name} line {number}: not JSON: {error}") from None
    start = size = 0
    for index, (_, line) in enumerate(lines):
        if index > start and (index - start == JOBS_PER_BATCH or size + len(line) > BYTES_PER_BATCH):
            yield {"jobs": jobs[start:index]}
            start, size = index, 0
        size += len(line)
    if start < len(jobs):
        yield {"jobs": jobs[start:]}
