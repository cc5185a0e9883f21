"""`nightpress status`: how far a job or a batch is, once or until it has ended."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Any

import click

from api.cli_client import (
    client_options,
    exit_status,
    json_option,
    local_time,
    patiently,
    plural,
    progress,
)
from api.client import Client

ENDED = ("completed", "failed", "cancelled", "expired")  # of jobs and of batches


@click.command()
@click.argument("name", metavar="ID")
@click.option("--watch", is_flag=True, help="Wait until it has ended, with a progress bar.")
@click.option(
    "--interval",
    type=click.FloatRange(0.05, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between looks.",
)
@json_option
@client_options
def status(name: str, watch: bool, interval: float, client: Client, as_json: bool) -> None:
    """How far a job or a batch is.

    Exit status 1 when it failed, wholly or in part, 3 when nothing failed but something was cancelled or expired.
    """
    found = client.get("v1", plural(name), name)
    if watch:
        found = wait(client, name, found, interval)
    click.echo(json.dumps(found) if as_json else _text(found))
    sys.exit(exit_status(counts_of(found)))


def wait(client: Client, name: str, found: dict[str, Any], interval: float) -> dict[str, Any]:
    """The job or batch once it has ended; `found` is what it was a moment ago. Draws a bar."""
    counts = counts_of(found)
    made, made_at = _tokens(found), time.monotonic()
    with progress(name, sum(counts.values())) as bar:
        while True:
            bar.update(sum(counts[state] for state in ENDED) - bar.n)
            if found["status"] in ENDED:
                return found
            time.sleep(interval)
            found = patiently(lambda: client.get("v1", plural(name), name))
            counts = counts_of(found)
            tokens, at = _tokens(found), time.monotonic()
            if tokens > made:  # told as jobs end, so by what came since the last one did
                bar.set_postfix_str(f"{(tokens - made) / (at - made_at):.0f} tok/s")
                made, made_at = tokens, at


def counts_of(found: dict[str, Any]) -> Counter[str]:
    """Jobs by state. A batch that was refused as a whole has no jobs, and failed."""
    if found["object"] != "batch":
        return Counter([found["status"]])
    counts = Counter(found["job_counts"])
    return counts if sum(counts.values()) else Counter([found["status"]])


def _tokens(found: dict[str, Any]) -> int:
    usage = found["usage"] or {}
    return int(usage.get("output_tokens", usage.get("completion_tokens", 0)))


def _text(found: dict[str, Any]) -> str:
    if found["object"] == "batch":
        counts = ", ".join(f"{number} {state}" for state, number in found["job_counts"].items() if number)
        usage = found["usage"]
        return (
            f"{found['id']}  {found['status']}  {found['request_counts']['total']} jobs: {counts}\n"
            f"  tokens: {usage['input_tokens']} in, {usage['output_tokens']} out{_when(found)}{_errors(found)}"
        )
    lines = [f"{found['id']}  {found['status']}  attempts: {found['attempts']}{_when(found)}"]
    if found["error"]:
        from jobs.failures import in_words

        lines.append(f"  {in_words(found['error'])}")
    return "\n".join([*lines, *(output["text"] for output in found["outputs"] or ())])


def _errors(found: dict[str, Any]) -> str:
    """Of a file that was refused, line by line."""
    places = [
        (f"line {one['line']}: " if one["line"] else "", one)
        for one in (found["errors"] or {"data": ()})["data"]
    ]
    return "".join(f"\n  {place}{one['code']}: {one['message']}" for place, one in places)


def _when(found: dict[str, Any]) -> str:
    """Of an open job or batch: when it will be done, or why nothing moves."""
    waits = "".join(f"\n  {no_worker(model)}" for model in found["unserved_models"] or ())
    if found["status"] == "queued" and (begins := found["not_before"]) and begins > time.time():
        waits += f"\n  not before {local_time(begins)}"
    moment = found["estimated_completion_at"]
    return waits if moment is None else f"{waits}\n  done at about {local_time(moment)}"


def no_worker(model: str) -> str:
    return f"no worker serves {model} now: its jobs wait until one does"
