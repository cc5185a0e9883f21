"""Commands that run the service say in one sentence what they cannot start with, and make nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from api.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("worker", "--model", "x"), "nightpress migrate"),
        (("keys", "list"), "there is no database"),
        (("up", "--model", "/no/such/model"), "there is no such model"),
        (("api", "--data-dir", "/dev/null/x"), "Not a directory"),
    ],
    ids=["worker", "keys", "up", "api"],
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
    assert "NIGHTPRESS_PORT: must be a valid integer" in CliRunner().invoke(main, ["migrate"]).output


def test_the_version_is_told() -> None:
    done = CliRunner().invoke(main, ["--version"], prog_name="nightpress")
    assert (done.exit_code, done.output.split()[0]) == (0, "nightpress")


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
