"""compose.yaml: no Docker here, so its structure is held to what it must say, and every key to what compose knows."""

from __future__ import annotations

import re
from typing import Any

import yaml
from click.testing import CliRunner

from jobs.settings import Settings
from tests.support.tree import PACKAGES, ROOT

TOP_LEVEL = {"name", "services", "volumes", "networks", "secrets", "configs", "include"}
SERVICE = {
    "image",
    "build",
    "command",
    "entrypoint",
    "environment",
    "ports",
    "volumes",
    "depends_on",
    "healthcheck",
}
SERVICE |= {"restart", "init", "profiles", "deploy", "stop_grace_period", "user", "networks", "secrets"}
HEALTHCHECK = {"test", "interval", "timeout", "retries", "start_period", "start_interval", "disable"}
BUILD = {"context", "dockerfile", "dockerfile_inline", "args", "target"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
    return loaded


def services() -> dict[str, dict[str, Any]]:
    return dict(compose()["services"])


def test_every_key_is_one_that_compose_knows() -> None:
    document = compose()
    assert {key for key in document if not key.startswith("x-")} <= TOP_LEVEL
    for name, service in services().items():
        assert set(service) <= SERVICE, name
        assert set(service.get("healthcheck", {})) <= HEALTHCHECK, name
        assert set(service.get("build", {})) <= BUILD, name
        assert re.fullmatch(r"no|always|on-failure(:\d+)?|unless-stopped", service["restart"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith((".", "/")) or source in document["volumes"], volume


def test_who_waits_for_whom() -> None:
    found = {
        name: {other: needs["condition"] for other, needs in service["depends_on"].items()}
        for name, service in services().items()
        if "depends_on" in service
    }
    after_migration = {"migrate": "service_completed_successfully", "redis": "service_healthy"}
    assert found == {
        "migrate": {"postgres": "service_healthy"},
        "first-key": {"migrate": "service_completed_successfully"},
        "api": {"first-key": "service_completed_successfully", "redis": "service_healthy"},
        "worker": after_migration,
        "worker-gpu": after_migration,
    }
    for needs in found.values():
        for other, condition in needs.items():
            assert condition in CONDITIONS
            assert condition != "service_healthy" or "healthcheck" in services()[other]


def test_what_each_service_promises() -> None:
    found = services()
    assert set(found) == {"redis", "postgres", "migrate", "first-key", "api", "worker", "worker-gpu"}
    assert "--maxmemory-policy noeviction" in found["redis"]["command"]
    assert "--appendonly yes" in found["redis"]["command"]
    assert found["migrate"]["restart"] == "no", "once"
    assert found["first-key"]["restart"] == "no", "once"
    assert "--if-none" in found["first-key"]["command"].split(), "a second start makes no second key"
    assert found["api"]["ports"] == ["127.0.0.1:8000:8000"], "no TLS here: loopback only"
    assert not [name for name in found if name != "api" and "ports" in found[name]]
    (device,) = found["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert found["worker-gpu"]["profiles"] == ["gpu"]
    assert "profiles" not in found["worker"]


def test_commands_exist_as_they_are_written() -> None:
    from api.cli import main

    for name, service in services().items():
        if service["image"].startswith("nightpress"):
            result = CliRunner().invoke(main, [*service["command"].split(), "--help"])
            assert result.exit_code == 0, f"{name}: {result.output}"


def test_the_environment_is_one_that_settings_accept() -> None:
    environment = services()["worker"]["environment"]
    values = {
        name.removeprefix("NIGHTPRESS_").lower(): re.sub(r"\$\{\w+:-(.*)\}", r"\1", value)
        for name, value in environment.items()
        if name.startswith("NIGHTPRESS_")
    }
    assert set(values) <= set(Settings.model_fields)
    settings = Settings(**values)
    assert settings.database.startswith("postgresql+psycopg://")
    assert not settings.embedded_broker


def test_the_image_holds_what_the_distribution_needs() -> None:
    lines = services()["worker"]["build"]["dockerfile_inline"].splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert copied == {"pyproject.toml", "README.md", *PACKAGES}
    assert all((ROOT / name).exists() for name in copied)
    assert "USER nightpress" in lines, "not as root"
    assert lines.index("RUN pip install --no-cache-dir .") < lines.index("USER nightpress")
