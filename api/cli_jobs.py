"""Commands for those who have work: submit, cancel, retry. All speak HTTP to a running API."""

from __future__ import annotations

import json
from typing import IO, Any

import click

from api.cli_client import (
    client_options,
    idempotency_key_option,
    json_option,
    plural,
    progress,
)
from api.cli_database import opened
from api.cli_job_file import bodies_of
from api.cli_status import no_worker
from api.client import Client


@click.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--prompt", "prompts", multiple=True, help="A prompt instead of a file; may be repeated.")
@click.option("--model", help="Model of the jobs of --prompt.")
@click.option("--max-tokens", type=int, help="Limit of the jobs of --prompt.")
@idempotency_key_option(
    "Your name for this submit: given again with the same jobs, it hands in nothing twice."
)
@click.option("--tier", type=click.Choice(["normal", "background"]), help="background: only where idle.")
@click.option("--priority", type=click.IntRange(-4, 4), help="Each step doubles the share of these jobs.")
@click.option("--completion-window", help="How long it may take, such as 90m, 24h or 7d.")
@click.option("--not-before", type=float, help="Unix seconds before which nothing starts.")
@click.option("--deadline", type=float, help="Unix seconds at which it must be done; instead of a window.")
@click.option(
    "--max-attempts", type=click.IntRange(1, 20), help="Times that a job is tried before it is failed."
)
@click.option("--backoff-seconds", type=float, help="Pause before the second attempt; doubled for each more.")
@json_option
@client_options
def submit(
    file: IO[bytes] | None,
    prompts: tuple[str, ...],
    model: str | None,
    max_tokens: int | None,
    idempotency_key: str | None,
    client: Client,
    as_json: bool,
    **terms: Any,
) -> None:
    """Hand in jobs and print the id of the job or the batch.

    FILE (or - for standard input) holds one JSON job, `{"jobs": […]}`, an array of jobs, or one job per line.
    More jobs than one batch takes become several batches.
    """
    if (file is None) == (not prompts):
        raise click.UsageError("give a FILE, or - for standard input, or --prompt")
    if file is not None and (model is not None or max_tokens is not None):
        raise click.UsageError("--model and --max-tokens belong to --prompt; jobs of a FILE name their own")
    bodies = (
        list(bodies_of(file)) if file else [_body_of_prompts(prompts, model=model, max_tokens=max_tokens)]
    )
    given = _terms(**terms)
    asleep: set[str] = set()
    sizes = [len(body["jobs"]) if isinstance(body.get("jobs"), list) else 1 for body in bodies]
    with progress("submitted", sum(sizes), wanted=len(bodies) > 1) as bar:
        for number, (body, size) in enumerate(zip(bodies, sizes, strict=True)):
            key = f"{idempotency_key}-{number}" if idempotency_key and number else idempotency_key
            made = client.post("v1", "jobs", body=body | given, idempotency_key=key)
            click.echo(json.dumps(made) if as_json else made["id"])
            asleep.update(made["unserved_models"] or ())
            bar.update(size)
    for model in sorted(asleep):
        click.echo(f"nightpress: {no_worker(model)}", err=True)


def _body_of_prompts(prompts: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    given = {name: value for name, value in fields.items() if value is not None}
    jobs = [{"prompt": prompt, **given} for prompt in prompts]
    return jobs[0] if len(jobs) == 1 else {"jobs": jobs}


def _terms(*, max_attempts: int | None, backoff_seconds: float | None, **terms: Any) -> dict[str, Any]:
    """The options that say when a job runs, as fields of a body. Raises `click.UsageError`."""
    if max_attempts is None and backoff_seconds is not None:
        raise click.UsageError("--backoff-seconds needs --max-attempts")
    given = {name: value for name, value in terms.items() if value is not None}
    if max_attempts is None:
        return given
    pause = {} if backoff_seconds is None else {"backoff_seconds": backoff_seconds}
    return given | {"retry": {"max_attempts": max_attempts, **pause}}


@click.command()
@click.argument("name", metavar="[ID]", required=False)
@click.option(
    "--model", help="Instead of ID: all open jobs of this model, of every tenant, in the database itself."
)
@json_option
@client_options
def cancel(name: str | None, model: str | None, client: Client, as_json: bool) -> None:
    """Cancel a job, or all open jobs of a batch.

    With --model, which is for whoever runs the service, all that wait for a model: one that no worker will serve
    again.
    """
    if name is None or model is not None:
        if name is not None or model is None:
            raise click.UsageError("give an ID or --model")
        _cancel_model(model, as_json)
        return
    found = client.post("v1", plural(name), name, "cancel")
    click.echo(json.dumps(found) if as_json else f"{found['id']}  {found['status']}")


def _cancel_model(model: str, as_json: bool) -> None:
    with opened(None) as (_, database):
        from jobs.cancels import Cancels

        with progress(model, None) as bar:
            jobs, num_files = Cancels(database).cancel_model(model, bar.update)
    numbers = {str(state): count for state, count in jobs.items()}
    said = ", ".join(f"{count} {state}" for state, count in numbers.items() if count)
    click.echo(json.dumps(numbers) if as_json else f"{model}  {said or 'no open jobs'}")
    if num_files:
        click.echo(
            f"nightpress: {num_files} {'batch' if num_files == 1 else 'batches'} of files still being read: "
            "their lines of this model will be cancelled, too",
            err=True,
        )


@click.command(short_help="Hand in once more what did not work out.")
@click.argument("name", metavar="ID")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(["failed", "expired", "cancelled"]),
    help="Jobs in which state; may be repeated. Otherwise failed and expired ones.",
)
@idempotency_key_option("Your name for this retry: given again, it hands in nothing twice.")
@json_option
@client_options
def retry(
    name: str, states: tuple[str, ...], idempotency_key: str | None, client: Client, as_json: bool
) -> None:
    """Hand in once more what did not work out of a batch, or one job, and print the new id."""
    body = {"states": list(states)} if states else {}
    made = client.post("v1", plural(name), name, "retry", body=body, idempotency_key=idempotency_key)
    click.echo(json.dumps(made) if as_json else made["id"])
