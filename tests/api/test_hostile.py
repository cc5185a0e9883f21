"""Hostile input, one table: each row is a clear refusal, and afterwards nothing is lost and memory is where it was.

Against a real server over a bare socket, so that nothing on this side mends what is sent. Rows name the answer that a
client gets: status, machine-readable code, and the field, if there is one.
"""

from __future__ import annotations

import gc
import http.client
import io
import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.support.batch_lines import jsonl
from tests.support.databases import Databases
from tests.support.hostile import CHAT, GOOD, LINE, LINES, MAX_ARRAY_JOBS, MAX_BODY_BYTES, TABLE, Row
from tests.support.processes import Process
from tests.support.waiting import wait_until

MAX_GROWTH_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def server(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    """One api, without workers and without Redis; its process and its address."""
    folder = tmp_path_factory.mktemp("hostile")
    with databases.fresh("postgresql") as url:
        environment = {
            "NIGHTPRESS_DATA_DIR": str(folder / "data"),
            "NIGHTPRESS_DATABASE_URL": url,
            "NIGHTPRESS_REDIS_URL": f"unix://{folder}/no-redis",
            "NIGHTPRESS_MODEL_NAME": "asleep",
            "NIGHTPRESS_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
            "NIGHTPRESS_MAX_ARRAY_JOBS": str(MAX_ARRAY_JOBS),
            "NIGHTPRESS_SWEEP_SECONDS": "0.2",
        }
        process = Process("api", ["api", "--port", "0"], environment, folder)

        def address() -> str | None:
            assert process.alive, process.tail()
            found = re.search(r"listening on (http://\S+)", process.text())
            return found[1] if found else None

        yield process, str(wait_until(address, "the api listens", 60))
        process.destroy()


class Answer(io.BytesIO):
    """What `http.client` wants a socket to be."""

    def makefile(self, *_: Any, **__: Any) -> Answer:
        return self


def send(address: str, row: Row) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer."""
    place = urlsplit(address)
    body = (
        row.body
        if isinstance(row.body, bytes)
        else b""
        if row.body is None
        else json.dumps(row.body).encode()
    )
    headers = dict.fromkeys(name.lower() for name, _ in row.headers)
    lines = [f"{row.method} {row.path} HTTP/1.1", *(f"{name}: {value}" for name, value in row.headers)]
    if "host" not in headers:
        lines.append(f"Host: {place.netloc}")
    if "content-length" not in headers and row.method != "GET":
        lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join([*lines, "Connection: close", "", ""]).encode()
    with socket.create_connection((place.hostname or "", place.port or 0), 30) as connection:
        connection.sendall(head + body)
        said = b""
        while piece := connection.recv(65_536):
            said += piece
    answer = http.client.HTTPResponse(Answer(said))  # type: ignore[arg-type]
    answer.begin()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_a_clear_refusal(server: tuple[Process, str], row: Row) -> None:
    status, headers, body = send(server[1], row)
    assert status == row.status, body
    error = json.loads(body)["error"]
    assert (error["code"], error["param"]) == (row.code, row.param), error
    assert error["type"] == "invalid_request_error"
    assert 5 < len(error["message"]) < 1_200
    assert headers["x-request-id"].startswith("req_")
    assert "x-evil" not in headers


def test_headers_without_end(server: tuple[Process, str]) -> None:
    """Nobody has shown a key yet, so nobody may fill the memory."""
    place = urlsplit(server[1])
    with socket.create_connection((place.hostname or "", place.port or 0), 30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 70_000)
        said = b""
        while piece := connection.recv(65_536):
            said += piece
    assert said.startswith(b"HTTP/1.1 431 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


def test_many_requests_through_one_connection_are_counted_one_by_one(server: tuple[Process, str]) -> None:
    with httpx.Client(base_url=server[1], headers={"X-Long": "a" * 30_000}) as client:
        assert [client.get("/health").status_code for _ in range(5)] == [200] * 5


def test_there_are_sixty_rows_of_different_names() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert len(TABLE) + len(LINES) >= 60


def test_hostile_lines(server: tuple[Process, str]) -> None:
    """Each with its number and its code, the good lines among them without one; none becomes a job."""
    good = [jsonl([{**LINE, "custom_id": f"good-{i}"}]).strip() for i in range(len(LINES))]
    content = b"".join(one + b"\n" + line + b"\n" for one, (line, _) in zip(good, LINES, strict=True))
    with httpx.Client(base_url=server[1]) as client:
        file = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", content)})
        wish = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        batch_id = client.post("/v1/batches", json=wish).json()["id"]

        def ended() -> dict[str, Any] | None:
            batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
            return batch if batch["status"] == "failed" else None

        batch = wait_until(ended, "the batch is checked", 30) or {}
        jobs = client.get("/v1/jobs", params={"batch_id": batch_id}).json()
    found = {one["line"]: one["code"] for one in batch["errors"]["data"]}
    assert found == {2 * i + 2: code for i, (_, code) in enumerate(LINES)}
    assert jobs["data"] == []


def test_nothing_is_lost_and_memory_is_flat(server: tuple[Process, str]) -> None:
    """The whole table over and over: the jobs that were there stay, none is added, and the process grows no more."""
    process, address = server
    with httpx.Client(base_url=address) as client:
        before = client.post("/v1/jobs", json={"jobs": [GOOD] * 20}).json()
        known = client.get("/v1/jobs?limit=100").json()

        def storm() -> int:
            for row in TABLE:
                send(address, row)
            return int(psutil.Process(process.pid).memory_info().rss)

        for _ in range(2):  # imports, pools, caches
            first = storm()
        for _ in range(5):
            last = storm()
        gc.collect()
        assert last - first < MAX_GROWTH_BYTES
        assert client.get("/v1/jobs?limit=100").json() == known
        assert client.get(f"/v1/batches/{before['id']}").json() == before
        assert client.post("/v1/jobs", json=GOOD).status_code == 202
    assert "Traceback" not in process.text(), process.tail()
