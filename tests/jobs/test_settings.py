"""Settings: one reader of the environment, with refusals that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.database import Database
from jobs.settings import Settings


def test_nothing_set_is_embedded_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.embedded_broker
    assert settings.database == f"sqlite:///{tmp_path}/.nightpress/nightpress.sqlite3"
    assert settings.redis == f"unix://{tmp_path}/.nightpress/valkey.sock?db=0"
    assert settings.broker == f"redis+socket://{tmp_path}/.nightpress/valkey.sock?virtual_host=0"
    assert (settings.host, settings.served_model) == ("127.0.0.1", "")


def test_the_environment_is_read_with_prefix_and_nesting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "NIGHTPRESS_PORT": "0",
        "NIGHTPRESS_MODEL": "org/name",
        "NIGHTPRESS_REDIS_URL": "redis://host:1/2",
        "NIGHTPRESS_DATABASE_URL": "postgres://u:p@host/db",
        "NIGHTPRESS_ENGINE__MAX_NUM_SEQS": "7",
        "NIGHTPRESS_LEASE_SECONDS": "",
        "NIGHTPRESS_NOBODY_KNOWS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.port, settings.served_model, settings.engine.max_num_seqs) == (0, "name", 7)
    assert (settings.redis, settings.broker) == ("redis://host:1/2", "redis://host:1/2")
    assert settings.database == "postgresql+psycopg://u:p@host/db"
    assert settings.lease_seconds == 15.0
    assert settings.engine_config().model == "org/name"
    assert settings.engine_config().max_num_seqs == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000),
        ("database_url", "mysql://x"),
        ("redis_url", "http://x"),
        ("max_n", 0),
        ("max_n", 129),
        ("lease_seconds", 0),
        ("claim_window", 0),
        ("log_level", "loud"),
        ("engine", {"unknown": 1}),
        ("engine", {"device": "tpu"}),
    ],
)
def test_a_bad_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**{name: value})  # type: ignore[arg-type]
    assert caught.value.errors()[0]["loc"][0] == name


def test_a_lease_must_outlive_two_renewals() -> None:
    with pytest.raises(ValidationError, match="renew_seconds must be at most half"):
        Settings(lease_seconds=3, renew_seconds=2)


SECRET = "s3cretX"


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("redis_url", "redis://:s3cretX/tail@host:6379/0"),
        ("redis_url", "redis://:s3cretX#tail@host:6379/0"),
        ("redis_url", "redis://:s3cretX?tail@host:6379/0"),
        ("redis_url", "redis://:12?s3cretX=1@host:6379/0"),
        ("redis_url", "redis://:12/3?s3cretX@host:6379/0"),
        ("redis_url", "redis://:12#s3cretX@host:6379/0"),
        ("redis_url", "redis://user:s3cretX@tail/more@host/0"),
        ("redis_url", "rediss://:s3cretX[@host/0"),
        ("redis_url", "redis://:s3cretX℀@host/0"),
        ("redis_url", "redis://host:s3cretX/0"),
        ("redis_url", "redis://host/s3cretX"),
        ("redis_url", "redis://host/0?db=s3cretX"),
        ("redis_url", "unix:///path?db=s3cretX"),
        ("redis_url", "unix://:s3cretX/tail@/path"),
        ("redis_url", "unix://:pass@/s3cretX@/path"),
        ("redis_url", "unix://s3cretX/path"),
        ("redis_url", "http://:s3cretX@host"),
        ("database_url", "postgresql://user:s3cretX@tail@host/name"),
        ("database_url", "postgresql://user:pass@s3cretX:5@host:5432/name"),
        ("database_url", "postgresql://user:pass@s3cretX?tail@host/name"),
        ("database_url", "postgresql://us/er:s3cretX@host/name"),
        ("database_url", "postgresql://host:s3cretX/name"),
        ("database_url", "mysql://user:s3cretX@host"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused_without_any_of_it(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.setenv(f"NIGHTPRESS_{name.upper()}", url)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert SECRET not in str(caught.value)
    (error,) = caught.value.errors()
    assert error["loc"] == (name,)
    assert SECRET not in error["msg"]
    assert "percent-encode" in error["msg"] or "must start with" in error["msg"]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("redis_url", "redis://"),
        ("redis_url", "redis:///3"),
        ("redis_url", "redis://host"),
        ("redis_url", "redis://:6379/0"),
        ("redis_url", "redis://user:p%2Fa%23s%3Fs%40@host:6379/15?socket_timeout=5"),
        ("redis_url", "redis://:pass:w@rd@host:6379/0/"),
        ("redis_url", "rediss://[::1]:6379?db=2"),
        ("redis_url", "unix:///run/a@b/valkey.sock"),
        ("redis_url", "unix://user:pass@/run/valkey.sock?db=1"),
        ("database_url", "postgresql+psycopg://user:p/a#s?s@host:5432/name"),
        ("database_url", "postgresql+psycopg://user:p%40ss@host/name?sslmode=require"),
        ("database_url", "postgresql+psycopg://postgres@/name?host=%2Frun%2Fa%40b"),
        ("database_url", "postgresql+psycopg:///name"),
        ("database_url", "sqlite:////home/a@b/night#press.sqlite3"),
    ],
)
def test_an_address_that_its_library_reads_as_it_is_meant_is_taken(name: str, url: str) -> None:
    assert getattr(Settings(**{name: url}), name) == url  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/models/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
        ("org/model", "model"),
        ("folder/", "folder"),
    ],
)
def test_the_served_name_is_the_last_part_of_the_model(model: str, name: str) -> None:
    assert Settings(model=model).served_model == name
    assert Settings(model=model, model_name="other").served_model == "other"


@pytest.mark.parametrize("model", [".", "./", "../folder", "inside/.."])
def test_a_model_that_is_named_from_inside_its_folder_has_its_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "folder")
    assert Settings(model=model).served_model == "folder"
    assert Settings().served_model == ""


def test_a_folder_made_for_an_sqlite_file_is_its_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for _ in range(2):
        database = Database(f"sqlite:///{folder}/nightpress.sqlite3")
        with database.read():
            assert folder.stat().st_mode & 0o777 == 0o700
        database.close()
