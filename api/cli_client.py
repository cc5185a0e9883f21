"""What the commands that speak HTTP have in common: options, exit statuses, patience, progress.

Owns how such a command finds the API and how it fails: one line on standard error, in the server's words. Exit
statuses are 0 all well, 1 something failed or cannot be reached, 2 wrong usage, 3 something was cancelled or expired
(and nothing failed), 130 interrupted. Bars are drawn at a terminal only, on standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import click
from tqdm import tqdm

from api.cli_settings import load_settings
from api.client import Client, ClientError, Refused, Unreachable
from api.loopback import address_of
from jobs.key_text import BadKey, parse_key
from jobs.settings import Settings

T = TypeVar("T")

FAILED: Final = 1
UNDONE: Final = 3  # cancelled or expired
INTERRUPTED: Final = 130
PATIENCE_SECONDS: Final = 60.0  # of a command that waits, while the API is away
_PAUSE_SECONDS: Final = 1.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print the API's own objects.")


def idempotency_key_option(help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`--idempotency-key`, which travels in a header."""

    def checked(_: click.Context, __: click.Parameter, key: str | None) -> str | None:
        if key is not None and not (key.isascii() and key.isprintable()):
            raise click.BadParameter("must be printable ASCII characters")
        return key

    return click.option("--idempotency-key", callback=checked, help=help_text)


def client_options(command: Callable[..., None]) -> Callable[..., None]:
    """`--url` and `--api-key`, which reach the command as one `client`; and what goes wrong there, said politely."""
    polite = _fails_politely(command)

    @click.option("--url", help="Address of the API; otherwise the one of `nightpress up`, or the port.")
    @click.option(
        "--api-key",
        help="Key to send; better in NIGHTPRESS_API_KEY, since others can see a command's options.",
    )
    @wraps(command)
    def run(*args: Any, url: str | None, api_key: str | None, **kwargs: Any) -> None:
        polite(*args, client=_client(url, api_key), **kwargs)

    return run


def _client(url: str | None, api_key: str | None) -> Client:
    settings = load_settings(api_key=api_key)
    if settings.api_key:
        try:
            parse_key(settings.api_key)
        except BadKey as error:
            raise click.UsageError(f"--api-key or NIGHTPRESS_API_KEY: {error}") from None
    return Client(_checked(url or _beside(settings)), settings.api_key)


def _beside(settings: Settings) -> str:
    """The address of the service that keeps its data here; another account's folder is not for us to read."""
    try:
        return (settings.data_dir / "url").read_text().strip()
    except OSError:
        return address_of(settings.host, settings.port)


def _checked(url: str) -> str:
    """OpenAI's clients are given the address with `/v1`, which ours add themselves."""
    if not url.startswith(("http://", "https://")):
        raise click.UsageError(f"--url: {url} must start with http:// or https://")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # of the port, or half an IPv6 address
        usable = False
    if not usable:
        raise click.UsageError(f"--url: {url} is no address; write it like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def _fails_politely(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except ClientError as error:
            click.echo(f"nightpress: {error}", err=True)
            if isinstance(error, Refused) and error.status == 401:
                click.echo(
                    "a key goes into NIGHTPRESS_API_KEY or --api-key; whoever runs the service makes one: "
                    "nightpress keys create NAME",
                    err=True,
                )
            if isinstance(error, Unreachable):
                click.echo(
                    "if it runs elsewhere, say where: --url, or NIGHTPRESS_DATA_DIR as `up` has it", err=True
                )
            sys.exit(FAILED)
        except KeyboardInterrupt:
            click.echo("nightpress: interrupted; what was handed in goes on", err=True)
            sys.exit(INTERRUPTED)

    return run


def plural(name: str) -> str:
    return "batches" if name.startswith("batch_") else "jobs"


def exit_status(counts: dict[str, int]) -> int:
    """Of jobs, by their states: what scripts are told."""
    if counts.get("failed", 0):
        return FAILED
    return UNDONE if counts.get("cancelled", 0) or counts.get("expired", 0) else 0


def patiently(ask: Callable[[], T]) -> T:
    """The answer, also when the API is away for a while: a command that waits all night outlives a restart."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except (Unreachable, Refused) as error:
            passing = isinstance(error, Unreachable) or error.status == 503
            if not passing or time.monotonic() + _PAUSE_SECONDS > deadline:
                raise
        time.sleep(_PAUSE_SECONDS)


def progress(verb: str, total: int | None, *, wanted: bool = True) -> tqdm[Any]:
    """A bar of jobs, if standard error is a terminal and it is `wanted`."""
    return tqdm(total=total, desc=verb, unit="job", file=sys.stderr, disable=None if wanted else True)


def local_time(moment: int) -> str:
    """Unix seconds as this machine's clock shows them."""
    return datetime.fromtimestamp(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
