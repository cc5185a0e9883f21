"""Commands that run the service say in one sentence what they cannot start with, and make nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from api.cli import main
from tests.support.tree import ROOT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("worker", "--model", "x"), "nightpress migrate"),
        (("worker",), "--model or NIGHTPRESS_MODEL"),
        (("keys", "list"), "there is no database"),
        (("up", "--model", "/no/such/model"), "there is no such model"),
        (("api", "--data-dir", "/dev/null/x"), "/dev/null/x: Not a directory"),
        (("up", "--model", ".", "--data-dir", "/dev/null/x"), "/dev/null/x: Not a directory"),
        (("migrate", "--data-dir", "/dev/null/x"), "/dev/null/x: Not a directory"),
    ],
    ids=["worker", "no model", "keys", "up", "api", "up, no folder", "migrate"],
)
def test_what_is_not_there_is_one_sentence_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    folder = tmp_path / "new"
    monkeypatch.setenv("NIGHTPRESS_DATA_DIR", str(folder))
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit), done.exception
    assert said in done.output
    assert not folder.exists()


def test_a_wrong_setting_is_told_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTPRESS_DATABASE_URL", "mysql://x")
    done = CliRunner().invoke(main, ["migrate"])
    assert "NIGHTPRESS_DATABASE_URL: must start with sqlite:/// or postgresql://" in done.output
    monkeypatch.setenv("NIGHTPRESS_DATABASE_URL", "")
    monkeypatch.setenv("NIGHTPRESS_PORT", "abc")
    assert "NIGHTPRESS_PORT: must be a valid integer\n" in CliRunner().invoke(main, ["migrate"]).output


def test_the_version_is_told() -> None:
    done = CliRunner().invoke(main, ["--version"], prog_name="nightpress")
    assert (done.exit_code, done.output.split()[0]) == (0, "nightpress")


@pytest.mark.parametrize("group", [[], ["keys"], ["prices"], ["schedule"], ["tenants"]])
def test_the_help_of_a_group_says_whole_sentences(group: list[str]) -> None:
    """click cuts what does not fit into 80 columns."""
    said = CliRunner().invoke(main, [*group, "--help"], terminal_width=80).output.partition("Commands:")[2]
    assert [line for line in said.splitlines() if line and not line.endswith(".")] == []
    assert "..." not in said


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("REDIS_URL", "redis://:s3cretX/tail@host:6379/0"),
        ("REDIS_URL", "redis://:s3cretX#tail@host:6379/0"),
        ("DATABASE_URL", "postgresql://user:s3cretX@tail@host:5432/name"),
    ],
)
@pytest.mark.parametrize("command", ["api", "worker", "migrate", "up", "doctor", "keys list"])
def test_no_command_shows_a_password_that_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch, command: str, name: str, url: str
) -> None:
    monkeypatch.setenv(f"NIGHTPRESS_{name}", url)
    done = CliRunner().invoke(main, command.split())
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit), done.exception
    assert f"NIGHTPRESS_{name}: cannot be read as" in done.output
    assert "percent-encode" in done.output
    assert "s3cretX" not in done.output
    assert "tail" not in done.output


@pytest.mark.parametrize("arguments", [["--version"], ["submit", "--help"], ["migrate"]])
def test_a_disk_that_is_full_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "api.cli", *arguments],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "NIGHTPRESS_DATA_DIR": str(tmp_path),
                "PYTHONUNBUFFERED": "",
            },
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "nightpress: No space left on device\n")


def test_ctrl_c_ends_every_command_with_130(tmp_path: Path) -> None:
    """One that waits for a database which takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://somebody@127.0.0.1:{silent.getsockname()[1]}/press"
        with subprocess.Popen(
            [sys.executable, "-m", "api.cli", "keys", "list"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "NIGHTPRESS_DATABASE_URL": url},
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.default_int_handler
            ),  # wherever the tests run
        ) as process:
            try:
                silent.settimeout(60)
                connection, _ = silent.accept()
                with connection:
                    process.send_signal(signal.SIGINT)
                    _, errors = process.communicate(timeout=30)
            finally:
                process.kill()
    assert (process.returncode, errors) == (130, b"nightpress: interrupted\n")
