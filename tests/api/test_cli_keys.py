"""`nightpress keys` and `nightpress tenants`, and a service that has keys, from the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from api.cli import main
from jobs.database import Database
from jobs.key_text import new_key, parse_key
from jobs.keys import Keys
from tests.api.test_cli import START_SECONDS
from tests.house.test_compose import services
from tests.support.databases import Databases
from tests.support.processes import Process
from tests.support.waiting import wait_until

Run = Callable[..., Result]


@pytest.fixture
def run(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command on a migrated database."""
    monkeypatch.setenv("NIGHTPRESS_DATABASE_URL", database_url)
    return lambda *arguments: CliRunner().invoke(main, arguments)


def as_json(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_key_is_printed_alone_and_once(run: Run) -> None:
    made = run("keys", "create", "nightly")
    assert made.exit_code == 0, made.output
    key = parse_key(made.stdout.removesuffix("\n"))
    assert "only time" in made.stderr
    assert key.id in made.stderr
    assert key.text not in made.stderr
    for arguments in (["keys", "list"], ["keys", "list", "--json"], ["keys", "revoke", key.id]):
        shown = run(*arguments)
        assert shown.exit_code == 0
        assert key.id in shown.output
        assert key.text[16:] not in shown.output
    (listed,) = as_json(run("keys", "list", "--json"))["data"]
    assert listed == {
        "id": key.id,
        "object": "key",
        "tenant": "default",
        "name": "nightly",
        "scopes": ["read", "submit"],
        "status": "revoked",
        "created_at": listed["created_at"],
        "expires_at": None,
        "revoked_at": listed["revoked_at"],
        "last_used_at": None,
    }


def test_keys_from_first_to_last(run: Run) -> None:
    as_json(run("tenants", "create", "blog", "--json"))
    made = as_json(
        run("keys", "create", "site", "--tenant", "blog", "--scope", "admin", "--expires-in", "90d", "--json")
    )
    assert (made["tenant"], made["scopes"], made["status"]) == ("blog", ["admin"], "live")
    assert made["expires_at"] - made["created_at"] in (90 * 86_400, 90 * 86_400 + 1)
    rotated = as_json(run("keys", "rotate", made["id"], "--overlap", "2h", "--json"))
    assert rotated["key"] != made["key"]
    assert (rotated["tenant"], rotated["name"], rotated["scopes"]) == ("blog", "site", ["admin"])
    assert rotated["replaces"]["id"] == made["id"]
    assert rotated["replaces"]["expires_at"] < made["expires_at"]
    again = run("keys", "rotate", rotated["id"])
    assert parse_key(again.stdout.strip()).id not in (made["id"], rotated["id"])
    assert f"{rotated['id']}  blog" in again.stderr
    assert len(as_json(run("keys", "list", "--tenant", "blog", "--json"))["data"]) == 3
    assert as_json(run("keys", "list", "--tenant", "default", "--json"))["data"] == []
    assert as_json(run("keys", "revoke", made["id"], "--json"))["status"] == "revoked"


def test_compose_makes_one_first_key(run: Run) -> None:
    command = services()["first-key"]["command"].split()
    first, second = run(*command), run(*command)
    assert parse_key(first.stdout.strip())
    assert (second.exit_code, second.stdout) == (0, "")
    assert "already" in second.stderr
    (key,) = as_json(run("keys", "list", "--json"))["data"]
    assert key["scopes"] == ["admin"]


def test_tenants(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTPRESS_QUOTA_STORED_BYTES", "1000")
    options = ["--queued-jobs", "50", "--tokens-per-day", "none", "--weight", "2"]
    made = as_json(run("tenants", "create", "blog", *options, "--json"))
    assert (made["id"], made["object"], made["weight"]) == ("blog", "tenant", 2.0)
    assert made["quotas"] == {
        "queued_jobs": {"limit": 50, "used": 0},
        "queued_tokens": {"limit": None, "used": 0},
        "stored_bytes": {"limit": 1000, "used": 0},
        "tokens_per_day": {"limit": None, "used": 0},
    }
    changed = as_json(run("tenants", "set", "blog", "--stored-bytes", "none", "--json"))
    assert changed["quotas"]["stored_bytes"]["limit"] is None
    assert changed["quotas"]["queued_jobs"]["limit"] == 50
    changed = as_json(
        run("tenants", "set", "blog", "--stored-bytes", "default", "--queued-jobs", "0", "--json")
    )
    assert changed["quotas"]["stored_bytes"]["limit"] == 1000
    assert changed["quotas"]["queued_jobs"]["limit"] == 0
    assert [one["id"] for one in as_json(run("tenants", "list", "--json"))["data"]] == ["blog", "default"]
    assert "blog  weight 2  queued_jobs 0 of 0  queued_tokens 0 of none" in run("tenants", "list").output


def test_mistakes_have_an_exit_status_and_a_reason(run: Run) -> None:
    wrong: list[tuple[list[str], int, str]] = [
        (["keys", "revoke", "key_nothing"], 1, "there is no key"),
        (["keys", "rotate", "key_nothing"], 1, "there is no key"),
        (["keys", "create", "x", "--tenant", "nobody"], 1, "tenant: there is no such tenant"),
        (["keys", "create", "x" * 101], 1, "name"),
        (["keys", "create"], 2, "NAME"),
        (["keys", "create", "x", "--scope", "root"], 2, "root"),
        (["keys", "create", "x", "--expires-in", "soon"], 2, "like 90s"),
        (["keys", "create", "x", "--expires-in", "0s"], 1, "expires_in: must be more"),
        (["tenants", "set", "nobody", "--weight", "1"], 1, "there is no such tenant"),
        (["tenants", "create", "default"], 1, "exists already"),
        (["tenants", "create", "No Name"], 1, "tenant: must be"),
        (["tenants", "set", "default", "--queued-jobs", "-1"], 2, "--queued-jobs"),
        (["tenants", "set", "default", "--queued-jobs", "many"], 2, "whole number"),
        (["tenants", "set", "default", "--weight", "0"], 1, "weight"),
    ]
    for arguments, status, words in wrong:
        result = run(*arguments)
        assert result.exit_code == status, f"{arguments}: {result.output}"
        assert words in result.output
        assert result.stdout == ""
        assert "Traceback" not in result.output
    assert as_json(run("keys", "list", "--json"))["data"] == []


@pytest.mark.parametrize("url", ["sqlite:///{}/empty.sqlite3", "postgresql://nobody@127.0.0.1:1/nothing"])
def test_a_database_that_cannot_be_used(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTPRESS_DATABASE_URL", url.format(tmp_path))
    for arguments in (["keys", "list"], ["keys", "create", "x"], ["tenants", "list"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1
        assert "nightpress migrate" in result.output or "cannot be used" in result.output


@pytest.fixture(scope="module")
def guarded(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, redis_server_url: str
) -> Iterator[tuple[Process, str]]:
    """An api on a public address, which it refused to bind until there was a key; and that key."""
    folder = tmp_path_factory.mktemp("guarded")
    arguments = ["api", "--host", "0.0.0.0", "--port", "0", "--url-file", str(folder / "url")]
    with databases.fresh("sqlite") as url:
        environment = {
            "NIGHTPRESS_DATABASE_URL": url,
            "NIGHTPRESS_REDIS_URL": redis_server_url,
            "NIGHTPRESS_MODEL": "tiny",
            "NIGHTPRESS_DATA_DIR": str(folder),
            "NIGHTPRESS_LOG_LEVEL": "debug",
        }
        refused = Process("refused", arguments, environment, folder)
        try:
            assert refused.wait(START_SECONDS) == 1
        finally:
            refused.destroy()
        assert "refusing to bind 0.0.0.0: there is no API key yet" in refused.text()
        assert "keys create" in refused.text()
        made = CliRunner(env=environment).invoke(main, ["keys", "create", "first"])
        process = Process("api", arguments, environment, folder)
        try:
            wait_until(
                lambda: (folder / "url").exists() or not process.alive, "the api starts", START_SECONDS
            )
            yield process, made.stdout.strip()
            database = Database(url)
            (key,) = Keys(database).all(None)
            assert key.last_used_at is not None
            database.close()
        finally:
            status = process.terminate(START_SECONDS)
            process.destroy()
    assert status == 0, process.tail()
    assert made.stdout.strip()[16:] not in process.text(), "a key in the log"


def test_a_service_with_keys(guarded: tuple[Process, str], monkeypatch: pytest.MonkeyPatch) -> None:
    process, key = guarded
    url = (process.log.parent / "url").read_text().strip().replace("0.0.0.0", "127.0.0.1")
    for path, status in (("/health", 200), ("/ready", 200), ("/v1/jobs", 401)):
        answer = httpx.get(f"{url}{path}", headers={"host": "press.example"}, trust_env=False)
        assert answer.status_code == status

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, [*arguments, "--url", url])

    without = run("submit", "--prompt", "a")
    assert (without.exit_code, without.stdout) == (1, "")
    assert "an API key is required" in without.stderr
    assert "NIGHTPRESS_API_KEY" in without.stderr
    job_id = run("submit", "--prompt", "a", "--api-key", key).stdout.strip()
    assert job_id.startswith("job_")
    monkeypatch.setenv("NIGHTPRESS_API_KEY", key)
    assert run("status", job_id).output.startswith(f"{job_id}  queued  attempts: 0\n")
    batch_id = run("submit", "--prompt", "a", "--prompt", "b").stdout.strip()
    assert run("results", batch_id).exit_code == 0
    assert "cancelled" in run("cancel", batch_id).output
    typing_mistake = key[:-10] + ("x" if key[-10] != "x" else "y") + key[-9:]
    wrong = run("status", job_id, "--api-key", typing_mistake)
    assert (wrong.exit_code, "typing mistake" in wrong.output) == (2, True)
    assert typing_mistake not in wrong.output


def test_a_key_is_not_sent_where_a_redirect_points(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    class Redirects(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            if self.path != "/elsewhere":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
                self.end_headers()
            else:
                self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    key = new_key().text
    monkeypatch.setenv("NIGHTPRESS_API_KEY", key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            result = CliRunner().invoke(
                main, ["status", "job_1", "--url", f"http://127.0.0.1:{server.server_port}"]
            )
        finally:
            server.shutdown()
            thread.join()
    assert result.exit_code == 1
    assert seen == [("/v1/jobs/job_1", f"Bearer {key}"), ("/elsewhere", None)]
