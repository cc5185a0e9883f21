"""`nightpress schedule`: jobs that are handed in again and again. Speaks HTTP to a running API.

A schedule is named by its id or by its name.
"""

from __future__ import annotations

import json
from typing import IO, Any

import click

from api.cli_client import client_options, json_option, local_time
from api.cli_job_file import bodies_of
from api.client import Client, ClientError

PAGE = 100


@click.group(short_help="Jobs that are handed in again and again, by a cron line.")
def schedule() -> None:
    """Jobs that are handed in again and again, at the times of a cron line.

    SCHEDULE is an id or a name.
    """


@schedule.command("create")
@click.argument("name")
@click.argument("file", type=click.File("rb"))
@click.option("--cron", required=True, help="Minute, hour, day of month, month, day of week: '30 1 * * *'.")
@click.option("--time-zone", default="UTC", show_default=True, help="Whose clock that is: Europe/Berlin.")
@click.option(
    "--missed",
    type=click.Choice(["skip", "run_once"]),
    default="skip",
    show_default=True,
    help="What becomes of times at which the service was down.",
)
@click.option("--completion-window", help="How long each run may take, such as 6h.")
@click.option("--paused", is_flag=True, help="Make it, and let it wait for `resume`.")
@json_option
@client_options
def create(
    name: str,
    file: IO[bytes],
    cron: str,
    time_zone: str,
    missed: str,
    completion_window: str | None,
    paused: bool,
    client: Client,
    as_json: bool,
) -> None:
    """Make a schedule of the jobs in FILE and print its id.

    FILE (or - for standard input) holds what `submit` takes: jobs, one per line, or `{"jobs": […]}`. What it holds
    now is what every run hands in.
    """
    bodies = list(bodies_of(file))
    if len(bodies) > 1:
        raise click.UsageError("FILE holds more jobs than one batch takes")
    (body,) = bodies
    if "jobs" not in body:
        body = {"jobs": [body]}
    fields = {"name": name, "cron": cron, "time_zone": time_zone, "missed": missed, "enabled": not paused}
    if completion_window is not None:
        fields["completion_window"] = completion_window
    made = client.post("v1", "schedules", body=body | fields)
    click.echo(json.dumps(made) if as_json else made["id"])


@schedule.command("list")
@json_option
@client_options
def list_schedules(client: Client, as_json: bool) -> None:
    """All schedules, newest first."""
    found: list[dict[str, Any]] = []
    after: list[tuple[str, str]] = []
    while True:
        page = client.get("v1", "schedules", query=[("limit", str(PAGE)), *after])
        found += page["data"]
        if not page["has_more"]:
            break
        after = [("after", page["last_id"])]
    if as_json:
        click.echo(json.dumps({"object": "list", "data": found}))
    else:
        for one in found:
            click.echo(_line(one))


@schedule.command("show")
@click.argument("name", metavar="SCHEDULE")
@json_option
@client_options
def show(name: str, client: Client, as_json: bool) -> None:
    """One schedule; with --json, its jobs too."""
    if as_json:
        click.echo(json.dumps(client.get("v1", "schedules", _id(client, name), query=[("include", "jobs")])))
    else:
        click.echo(_line(client.get("v1", "schedules", _id(client, name))))


@schedule.command("pause")
@click.argument("name", metavar="SCHEDULE")
@json_option
@client_options
def pause(name: str, client: Client, as_json: bool) -> None:
    """Let its times pass until `resume`."""
    _print(client.patch("v1", "schedules", _id(client, name), body={"enabled": False}), as_json)


@schedule.command("resume")
@click.argument("name", metavar="SCHEDULE")
@json_option
@client_options
def resume(name: str, client: Client, as_json: bool) -> None:
    """Fire again, from its next time on."""
    _print(client.patch("v1", "schedules", _id(client, name), body={"enabled": True}), as_json)


@schedule.command("run")
@click.argument("name", metavar="SCHEDULE")
@json_option
@client_options
def run(name: str, client: Client, as_json: bool) -> None:
    """Hand its jobs in now and print the batch's id."""
    started = client.post("v1", "schedules", _id(client, name), "run")
    click.echo(json.dumps(started) if as_json else started["batch_id"])


@schedule.command("delete")
@click.argument("name", metavar="SCHEDULE")
@json_option
@client_options
def delete(name: str, client: Client, as_json: bool) -> None:
    """Fire no more. Its runs and batches stay."""
    deleted = client.delete("v1", "schedules", _id(client, name))
    click.echo(json.dumps(deleted) if as_json else f"{deleted['id']}  deleted")


@schedule.command("runs")
@click.argument("name", metavar="SCHEDULE")
@click.option("--limit", type=click.IntRange(1, PAGE), default=20, show_default=True, help="At most so many.")
@json_option
@client_options
def runs(name: str, limit: int, client: Client, as_json: bool) -> None:
    """What became of its last times, latest first. After `delete`, by its id."""
    found = client.get("v1", "schedules", _id(client, name), "runs", query=[("limit", str(limit))])
    if as_json:
        click.echo(json.dumps(found))
        return
    for one in found["data"]:
        made = one["batch_id"] if one["error"] is None else f"refused: {one['error']['message']}"
        click.echo(f"{local_time(one['fire_time'])}  {one['kind']}  {made}")


def _id(client: Client, name: str) -> str:
    if name.startswith("schedule_"):
        return name
    found = client.get("v1", "schedules", query=[("name", name)])["data"]
    if not found:
        raise ClientError(f"there is no schedule {name!a}")
    return str(found[0]["id"])


def _print(found: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(found) if as_json else _line(found))


def _line(one: dict[str, Any]) -> str:
    state = "paused" if not one["enabled"] else "no time is left"
    if one["next_run_at"] is not None:
        state = f"next {local_time(one['next_run_at'])}"
    if one["deleted_at"] is not None:
        state = "deleted"
    return f"{one['id']}  {one['name']}  {one['cron']}  {one['time_zone']}  {one['num_jobs']} jobs  {state}"
