"""Checkup: what can be seen, from this machine, of the parts that a deployment is put together from.

Owns the questions and what is thought of the answers. `FAILED` is what will not work or not keep what it accepts,
`WARNING` what works with less than somebody may expect. Changes nothing: it makes no database and no folder, binds
nothing and downloads nothing. What the engine would compute with is asked of a process of its own (`engine.machine`),
which may compile kernels, as the first start would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import parse_qs, urlsplit

from sqlalchemy import make_url, text
from sqlalchemy.exc import SQLAlchemyError

from api.loopback import is_loopback
from engine.checkpoint import Checkpoint, is_hub_id
from engine.reasoning import format_of
from engine.tokenizer import Tokenizer
from jobs.broker import server_info
from jobs.database import Database, reason_of
from jobs.dialects import clock
from jobs.keys import Keys
from jobs.python_process import command_of, environment_of
from jobs.reads import Reads
from jobs.settings import Settings, unread_variables
from jobs.valkey import valkey_binary
from migrations.schema import misfit

CLOCK_SECONDS = 2.0  # how far the database's clock may be from ours
BROKER_SECONDS = 5.0
COMPILE_SECONDS = 300.0
_DURABLE = ("fsync", "full_page_writes", "synchronous_commit")  # off: PostgreSQL forgets what it has accepted
_GIB = 2**30


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    part: str  # of the deployment: settings, database, workers, keys, broker, files, model, engine
    verdict: Verdict
    says: str  # and, unless it is ok, what to do


def checkup(settings: Settings) -> Iterator[Finding]:
    """One finding or more of each part, the slowest last. Whatever a part raises is a finding, too."""
    for part, look in (
        ("settings", _settings),
        ("database", _database),
        ("broker", _broker),
        ("files", _files),
        ("model", _model),
        ("engine", _engine),
    ):
        try:
            yield from look(settings)
        except Exception as error:  # a path that nobody can look at, an address that no driver can read
            yield Finding(part, Verdict.FAILED, f"cannot be looked at: {type(error).__name__}: {error}")


def _settings(settings: Settings) -> Iterator[Finding]:
    """Only what is wrong: they have been read."""
    for name, meant in unread_variables().items():
        said = f"{name} is no setting" + (f": is {meant} meant?" if meant else "")
        yield Finding("settings", Verdict.WARNING, said)


def _database(settings: Settings) -> Iterator[Finding]:
    """And what only it knows: keys and workers."""
    where = make_url(settings.database).render_as_string(hide_password=True)
    path = settings.database_path
    if path is not None and not path.exists():
        advice = "`nightpress up` and `nightpress migrate` make it"
        yield Finding("database", Verdict.WARNING, f"{path} is not there yet: {advice}")
        return
    database = Database(settings.database, pool_size=1, read_only=True)
    try:
        with database.read() as connection:
            skew = clock(connection) - time.time()
            kept: dict[str, str] = {}
            if not database.is_sqlite:
                for name in ("server_version", *_DURABLE):
                    kept[name] = str(connection.execute(text(f"SHOW {name}")).scalar_one())
        if (why := misfit(database)) is not None:
            yield Finding("database", Verdict.FAILED, f"{where}: {why}")
            return
        version = f"PostgreSQL {kept['server_version']}, " if kept else ""
        yield Finding("database", Verdict.OK, f"{version}{where}, of this version")
        for name in _DURABLE:
            if kept.get(name) == "off":
                said = f"{name} is off: jobs that were accepted can be lost with the machine's power"
                yield Finding("database", Verdict.FAILED, said)
        if abs(skew) > CLOCK_SECONDS:
            said = f"its clock, which deadlines and schedules go by, is {skew:+.0f} s from this machine's"
            yield Finding("database", Verdict.WARNING, said)
        yield _keys(settings, Keys(database))
        yield _workers(settings, Reads(database))
    except SQLAlchemyError as error:
        yield Finding("database", Verdict.FAILED, f"{where} cannot be used: {reason_of(error)}")
    finally:
        database.close()


def _keys(settings: Settings, keys: Keys) -> Finding:
    if keys.any():
        return Finding("keys", Verdict.OK, "every request needs a key")
    if is_loopback(settings.host):
        said = "none yet: the API answers programs on its own machine, and asks them for nothing"
        return Finding("keys", Verdict.OK, said)
    said = f"none yet, so the API will not bind {settings.host}: `nightpress keys create NAME`"
    return Finding("keys", Verdict.FAILED, said)


def _workers(settings: Settings, reads: Reads) -> Finding:
    readiness = reads.readiness(settings.stall_seconds)
    if not readiness.ready:
        return Finding("workers", Verdict.WARNING, str(readiness.reason))
    if not readiness.num_workers:
        return Finding("workers", Verdict.OK, "none runs, and nothing waits for one")
    counts = ", ".join(f"{count} {state}" for state, count in sorted(readiness.num_workers.items()))
    serving = f", serving {', '.join(readiness.models)}" if readiness.models else ""
    return Finding("workers", Verdict.OK, counts + serving)


def _broker(settings: Settings) -> Iterator[Finding]:
    try:
        info = server_info(settings.redis, BROKER_SECONDS)
    except (OSError, ValueError) as error:
        if not settings.embedded_broker:
            yield Finding("broker", Verdict.FAILED, f"cannot be used: {error}")
            return
        try:
            valkey_binary()
        except RuntimeError as missing:
            yield Finding("broker", Verdict.FAILED, str(missing))
        else:
            said = "a private Valkey server, which `nightpress up` starts, and no other command"
            yield Finding("broker", Verdict.OK, said)
        return
    name, version = info.get("server_name", "redis"), info.get("valkey_version", info.get("redis_version"))
    yield Finding("broker", Verdict.OK, f"{name} {version} answers")
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory") and policy != "noeviction":
        said = (
            f"drops keys when memory is short (maxmemory-policy {policy}), and messages with them: noeviction"
        )
        yield Finding("broker", Verdict.WARNING, said)
    if not info.get("aof_enabled"):
        said = (
            "a restart may lose jobs that came as Celery messages and are in no database yet: appendonly yes"
        )
        yield Finding("broker", Verdict.WARNING, said)
    yield from exposed(settings.redis)


def exposed(redis_url: str) -> Iterator[Finding]:
    """What others could read of a broker's address, or do there."""
    address = urlsplit(redis_url)
    if address.scheme == "unix" or is_loopback(address.hostname or "localhost"):
        return
    if address.scheme == "redis":
        yield Finding("broker", Verdict.WARNING, "prompts and answers travel to it unencrypted: rediss://")
    if not address.password and not parse_qs(address.query).get("password"):
        said = "it asks for no password, and whoever reaches it can hand in jobs for any tenant"
        yield Finding("broker", Verdict.WARNING, said)


def _files(settings: Settings) -> Iterator[Finding]:
    there = settings.files
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding("files", Verdict.FAILED, f"{settings.files}: {there} is no folder that can be written")
        return
    free = shutil.disk_usage(there).free
    enough = free >= 2 * settings.max_file_bytes
    said = f"{settings.files}, {free / _GIB:.1f} GiB free"
    if not enough:
        said += ", less than two files of the largest size (NIGHTPRESS_MAX_FILE_BYTES)"
    yield Finding("files", Verdict.OK if enough else Verdict.WARNING, said)


def _model(settings: Settings) -> Iterator[Finding]:
    if not settings.model:
        yield Finding("model", Verdict.WARNING, "none named: NIGHTPRESS_MODEL, which workers and `up` need")
        return
    if is_hub_id(settings.model):
        said = f"{settings.model} is no path here; as a hub id it is fetched when a worker starts, not looked at now"
        yield Finding("model", Verdict.WARNING, said)
        return
    try:
        config = settings.engine_config()
        checkpoint = Checkpoint.open(settings.model, config.revision, model_impl=config.model_impl)
        tokenizer = Tokenizer.open(checkpoint)
        format_of(tokenizer, config.reasoning_parser)
    except (ValueError, OSError) as error:  # of the checkpoint, its tokenizer or the engine's settings
        yield Finding("model", Verdict.FAILED, str(error))
        return
    size = sum(file.stat().st_size for file in checkpoint.files) / _GIB
    yield Finding(
        "model",
        Verdict.OK,
        f"{settings.served_model}: {checkpoint.config.architecture}, {size:.2f} GiB, "
        f"{tokenizer.vocab_size} tokens, {'a' if tokenizer.has_chat_template else 'no'} chat template",
    )


def _engine(settings: Settings) -> Iterator[Finding]:
    command = command_of("engine.machine", settings.engine.device, settings.engine.kernels)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            check=False,
            env=environment_of(),
        )
    except subprocess.TimeoutExpired:
        yield Finding("engine", Verdict.FAILED, f"nothing was ready to compute in {COMPILE_SECONDS:.0f} s")
        return
    warned = done.stderr.strip().splitlines()
    try:
        found = json.loads(done.stdout)
    except ValueError:
        reason = warned[-1] if warned else f"status {done.returncode}"
        yield Finding("engine", Verdict.FAILED, f"torch and the kernels do not load: {reason}")
        return
    if "error" in found:
        yield Finding("engine", Verdict.FAILED, found["error"])
        return
    said = (
        f"{found['device']} ({found['name']}), {found['free_bytes'] / _GIB:.1f} GiB free, {found['kernels']} "
        f"kernels, torch {found['torch']}"
    )
    if found["kernels"] == "reference" and settings.engine.kernels != "reference":
        yield Finding("engine", Verdict.WARNING, f"{said}; {warned[-1] if warned else 'slow'}")
        return
    yield Finding("engine", Verdict.OK, said)
