"""`nightpress doctor` finds what is wrong with real parts, names what to do, and changes nothing."""

from __future__ import annotations

import json
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from click.testing import CliRunner, Result
from sqlalchemy import make_url, text

from api.checkup import Finding, Verdict, _model, checkup, exposed
from api.cli import main
from jobs.database import Database
from jobs.keys import Keys, Scope
from jobs.leases import register
from jobs.settings import Settings
from migrations.schema import TooNew, upgrade
from tests.support import leaks
from tests.support.databases import Databases
from tests.support.tiny import write_tiny_llama


@pytest.fixture(autouse=True)
def _no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which this suite knows its processes: no setting."""
    monkeypatch.delenv(leaks.MARK, raising=False)


def found(part: str, **given: Any) -> list[Finding]:
    """Of one part. Asks one finding further, which behind the model is the engine, and takes seconds."""
    findings = dropwhile(lambda finding: finding.part != part, checkup(Settings(**given)))
    return list(takewhile(lambda finding: finding.part == part, findings))


def only(part: str, **given: Any) -> Finding:
    (finding,) = found(part, **given)
    return finding


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_a_new_folder_lacks_nothing_but_a_model_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "MODEL", "FILES_DIR", "HOST"):
        monkeypatch.delenv(f"NIGHTPRESS_{name}", raising=False)
    folder = tmp_path / "new"
    done = doctor("--data-dir", str(folder))
    assert done.exit_code == 0, done.output
    lines = [line.split(maxsplit=2) for line in done.output.splitlines()]
    assert [line[:2] for line in lines] == [
        ["warning", "database"],
        ["ok", "broker"],
        ["ok", "files"],
        ["warning", "model"],
        ["ok", "engine"],
    ]
    assert "nightpress migrate" in lines[0][2]
    assert "NIGHTPRESS_MODEL" in lines[3][2]
    assert "cpu kernels" in lines[4][2]
    assert not folder.exists()


def test_a_variable_that_nothing_reads_is_a_slip_of_the_pen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTPRESS_DATABSE_URL", "postgresql://u@h/d")
    monkeypatch.setenv("NIGHTPRESS_XYZ", "1")
    monkeypatch.setenv("nightpress_log_level", "info")
    monkeypatch.setenv("NIGHTPRESS_ENGINE__THREADS", "1")
    says = [finding.says for finding in found("settings")]
    assert says == [
        "NIGHTPRESS_DATABSE_URL is no setting: is NIGHTPRESS_DATABASE_URL meant?",
        "NIGHTPRESS_XYZ is no setting",
    ]


@pytest.mark.parametrize(
    "database_url", [pytest.param("sqlite", marks=pytest.mark.long), "postgresql"], indirect=True
)
def test_a_deployment_that_works(database_url: str, redis_url: str, tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny")
    settings = Settings(
        data_dir=tmp_path, database_url=database_url, redis_url=redis_url, model=str(model), max_file_bytes=1
    )
    findings = [
        finding for finding in checkup(settings) if " is off: " not in finding.says
    ]  # of test servers
    assert {finding.verdict for finding in findings} == {Verdict.OK}, findings
    said = {finding.part: finding.says for finding in findings}
    assert list(said) == ["database", "keys", "workers", "broker", "files", "model", "engine"]
    assert "valkey" in said["broker"].lower()
    assert "LlamaForCausalLM" in said["model"]


def test_an_old_shape_and_an_unreachable_database(empty_database_url: str, tmp_path: Path) -> None:
    if empty_database_url.startswith("sqlite"):
        Path(str(make_url(empty_database_url).database)).touch()
    old = only("database", data_dir=tmp_path, database_url=empty_database_url)
    assert (old.verdict, "nightpress migrate" in old.says) == (Verdict.FAILED, True)
    away = only("database", data_dir=tmp_path, database_url="postgresql://nobody:hidden@127.0.0.1:1/none")
    assert away.verdict is Verdict.FAILED
    assert "127.0.0.1" in away.says
    assert "hidden" not in away.says
    noise = tmp_path / "noise.sqlite3"
    noise.write_bytes(b"no database" * 1000)
    assert only("database", data_dir=tmp_path, database_url=f"sqlite:///{noise}").verdict is Verdict.FAILED


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_commits_that_do_not_wait_for_the_disk(database_url: str, tmp_path: Path) -> None:
    database = Database(database_url, pool_size=1)
    name = make_url(database_url).database
    with database.write() as connection:
        connection.execute(text(f'ALTER DATABASE "{name}" SET synchronous_commit = off'))
    database.close()
    first, *others = found("database", data_dir=tmp_path, database_url=database_url)
    assert first.says.startswith("PostgreSQL ")
    (lost,) = (finding for finding in others if finding.says.startswith("synchronous_commit is off"))
    assert lost.verdict is Verdict.FAILED


def test_a_clock_that_is_off(databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with databases.fresh("sqlite") as url:
        monkeypatch.setattr(time, "time", lambda at=time.time: at() - 3_600)
        _, late = found("database", data_dir=tmp_path, database_url=url)
    assert (late.verdict, "+3600 s" in late.says) == (Verdict.WARNING, True)


def test_keys_and_the_address_to_bind(databases: Databases, tmp_path: Path) -> None:
    with databases.fresh("sqlite") as url:
        open_door = {"data_dir": tmp_path, "database_url": url, "host": "0.0.0.0"}
        without = only("keys", **open_door)
        assert (without.verdict, "nightpress keys create" in without.says) == (Verdict.FAILED, True)
        database = Database(url)
        Keys(database).create(tenant="default", name="one", scopes=[Scope.READ])
        database.close()
        assert only("keys", **open_door).verdict is Verdict.OK


def test_workers_that_live(databases: Databases, tmp_path: Path) -> None:
    with databases.fresh("sqlite") as url:
        database = Database(url)
        with database.write() as connection:
            register(connection, worker_id="w", model="tiny", lease_seconds=60)
        database.close()
        finding = only("workers", data_dir=tmp_path, database_url=url)
    assert (finding.verdict, finding.says) == (Verdict.OK, "1 starting")


@contextmanager
def configured(url: str, **values: str) -> Iterator[None]:
    with redis.Redis.from_url(url) as client:
        before = {name: client.config_get(name)[name] for name in values}
        try:
            for name, value in values.items():
                client.config_set(name, value)
            yield
        finally:
            for name, value in before.items():
                client.config_set(name, value)


def test_a_broker_that_forgets(redis_url: str, tmp_path: Path, given_redis_url: str | None) -> None:
    if given_redis_url:
        pytest.skip("a server that is not ours keeps its settings")
    options = {"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru", "appendonly": "no"}
    with configured(redis_url, **options):
        first, evicts, forgets = found("broker", data_dir=tmp_path, redis_url=redis_url)
    assert first.verdict is Verdict.OK
    assert (evicts.verdict, "noeviction" in evicts.says) == (Verdict.WARNING, True)
    assert (forgets.verdict, "appendonly yes" in forgets.says) == (Verdict.WARNING, True)


def test_a_broker_that_is_away(tmp_path: Path) -> None:
    finding = only("broker", data_dir=tmp_path, redis_url=f"unix://{tmp_path}/none.sock")
    assert finding.verdict is Verdict.FAILED


@pytest.mark.parametrize(
    ("url", "warnings"),
    [
        ("redis://broker.example:6379/0", 2),
        ("redis://:secret@broker.example:6379/0", 1),
        ("rediss://:secret@broker.example:6379/0", 0),
        ("rediss://broker.example:6379/0?password=secret", 0),
        ("redis://127.0.0.1:6379/0", 0),
        ("unix:///run/valkey.sock", 0),
    ],
)
def test_a_broker_in_the_open(url: str, warnings: int) -> None:
    assert [finding.verdict for finding in exposed(url)] == [Verdict.WARNING] * warnings


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    inside = only("files", data_dir=tmp_path, files_dir=tmp_path / "file" / "folder")
    assert inside.verdict is Verdict.FAILED
    full = only("files", data_dir=tmp_path, max_file_bytes=2**60)
    assert (full.verdict, "NIGHTPRESS_MAX_FILE_BYTES" in full.says) == (Verdict.WARNING, True)


def test_models(tmp_path: Path) -> None:
    """Asked alone: behind the model comes the engine."""

    def looked_at(**given: Any) -> Finding:
        (finding,) = _model(Settings(data_dir=tmp_path, **given))
        return finding

    broken = write_tiny_llama(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    for model in (broken, tmp_path / "missing", "a/b/c"):
        assert looked_at(model=str(model)).verdict is Verdict.FAILED, model
    hub = looked_at(model="some/model")
    assert (hub.verdict, "hub id" in hub.says) == (Verdict.WARNING, True)
    tiny = str(write_tiny_llama(tmp_path / "tiny"))
    finding = looked_at(model=tiny, engine={"reasoning_parser": "think"})
    assert (finding.verdict, "reasoning_parser" in finding.says) == (Verdict.FAILED, True)
    finding = looked_at(model=tiny, engine={"max_num_seqs": 0})
    assert (finding.verdict, "max_num_seqs" in finding.says) == (Verdict.FAILED, True)


def test_an_engine_that_cannot_compute_is_told_with_the_reason(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("here it can")
    finding = only("engine", data_dir=tmp_path, engine={"device": "cuda"})
    assert (finding.verdict, "no CUDA device" in finding.says) == (Verdict.FAILED, True)


def test_slow_kernels_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    finding = only("engine", data_dir=tmp_path)
    assert (finding.verdict, "no C compiler" in finding.says) == (Verdict.WARNING, True)


def test_a_failure_is_the_status_and_json_holds_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTPRESS_REDIS_URL", f"unix://{tmp_path}/none.sock")
    done = doctor("--json", "--data-dir", str(tmp_path))
    assert done.exit_code == 1
    broker = next(finding for finding in json.loads(done.stdout) if finding["part"] == "broker")
    assert broker["verdict"] == "failed"
    monkeypatch.setenv("NIGHTPRESS_LEASE_SECONDS", "nothing")
    wrong = doctor()
    assert wrong.exit_code == 2
    assert "NIGHTPRESS_LEASE_SECONDS" in wrong.output


def test_what_it_looks_at_stays_as_it_is(databases: Databases, tmp_path: Path) -> None:
    empty, foreign = tmp_path / "empty.sqlite3", tmp_path / "foreign.sqlite3"
    empty.touch()
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE something (id)")
    connection.close()
    before = foreign.read_bytes()
    for path in (empty, foreign):
        assert only("database", data_dir=tmp_path, database_url=f"sqlite:///{path}").verdict is Verdict.FAILED
    assert empty.stat().st_size == 0
    assert foreign.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {empty.name, foreign.name}


@pytest.mark.parametrize(
    ("part", "given"),
    [
        ("database", {"database_url": "postgresql://u:p@host:99999/db"}),
        ("database", {"database_url": f"sqlite:///{'/deep' * 2000}"}),
        ("broker", {"redis_url": "redis://127.0.0.1:1?zzz=1"}),
        ("files", {"files_dir": Path("/deep" * 2000)}),
        pytest.param("model", {"model": "~nosuchuser/model"}, marks=pytest.mark.long),
    ],
)
def test_what_cannot_even_be_looked_at_is_a_finding(part: str, given: dict[str, Any], tmp_path: Path) -> None:
    findings = found(part, data_dir=tmp_path, **given)
    assert [finding.verdict for finding in findings] == [Verdict.FAILED]


def test_a_socket_that_a_killed_server_left(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "valkey.sock"))
    left.close()
    finding = only("broker", data_dir=tmp_path)
    assert (finding.verdict, "nightpress up" in finding.says) == (Verdict.OK, True)


def test_a_database_of_a_newer_version(databases: Databases, tmp_path: Path) -> None:
    with databases.fresh("sqlite") as url:
        database = Database(url)
        with database.write() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        database.close()
        finding = only("database", data_dir=tmp_path, database_url=url)
        assert (finding.verdict, "newer version" in finding.says) == (Verdict.FAILED, True)
        assert "migrate" not in finding.says
        with pytest.raises(TooNew, match="9999"):
            upgrade(url)


def test_what_lies_in_the_current_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('this was run')")
    monkeypatch.chdir(tmp_path)
    assert only("engine", data_dir=tmp_path).verdict is Verdict.OK
