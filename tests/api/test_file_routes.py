"""Files over HTTP: what an upload may look like, and that one which ends badly leaves nothing."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi.testclient import TestClient
from openai.types import FileDeleted, FileObject
from sqlalchemy import update
from starlette.requests import ClientDisconnect, Request

from api import upload
from api.app import create_app
from api.upload import receive
from jobs.bad_field import BadField
from jobs.database import Database
from jobs.dialects import now
from jobs.file_store import FileStore, Part
from jobs.models import File
from jobs.settings import Settings
from jobs.tenants import DEFAULT, Tenants
from tests.api.test_job_routes import error_of
from tests.support.clients import local_client
from tests.support.databases import ON_SQLITE

LIMIT = 100_000


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, model="tiny", max_file_bytes=LIMIT, max_body_bytes=10_000)


@pytest.fixture(scope="module")
def door(databases: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One client for a module's refusals."""
    folder = tmp_path_factory.mktemp("door")
    with databases.fresh("sqlite") as url:
        database = Database(url)
        app = create_app(Settings(data_dir=folder, model="tiny", max_file_bytes=LIMIT), database)
        with local_client(app) as client:
            client.headers["x-folder"] = str(folder)  # for `nothing_stays`
            yield client
        database.close()


@pytest.fixture
def nothing_stays(door: TestClient) -> Iterator[None]:
    yield
    folder = Path(door.headers["x-folder"], "files")
    assert not folder.exists() or not list(folder.iterdir())
    assert door.get("/v1/files").json()["data"] == []


def send(client: TestClient, content: bytes, name: str = "in.jsonl", **fields: str) -> Any:
    return client.post("/v1/files", data={"purpose": "batch", **fields}, files={"file": (name, content)})


def form(*parts: tuple[str, bytes], end: bytes = b"--x--\r\n") -> bytes:
    """A body by hand: each part's disposition behind `form-data; `, and its content."""
    return (
        b"".join(
            b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head.encode(), content)
            for head, content in parts
        )
        + end
    )


PURPOSE, CONTENT = ('name="purpose"', b"batch"), ('name="file"; filename="a"', b"hello")
TYPE = {"content-type": "multipart/form-data; boundary=x"}


def test_a_file_goes_in_and_comes_out(client: TestClient, settings: Settings) -> None:
    content = os.urandom(70_000) + b"\r\n--not the boundary\r\n" + bytes(range(256))
    answer = send(client, content, name="Überblick \u2028 ../x.jsonl")
    assert answer.status_code == 200, answer.text
    file = FileObject.model_validate(answer.json())
    assert (file.bytes, file.purpose, file.status) == (len(content), "batch", "processed")
    assert file.filename == "Überblick \u2028 ../x.jsonl"
    assert file.expires_at is None
    assert client.get(f"/v1/files/{file.id}").json() == answer.json()
    got = client.get(f"/v1/files/{file.id}/content", headers={"accept": "application/binary"})
    assert got.content == content
    assert got.headers["content-length"] == str(len(content))
    assert got.headers["content-type"] == "application/octet-stream"
    disposition = got.headers["content-disposition"]
    assert unquote(disposition.removeprefix("attachment; filename*=UTF-8''")) == file.filename
    assert disposition.isascii(), "and it can be told in a header"
    head = client.head(f"/v1/files/{file.id}/content")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(content)), "how long it is, without fetching it"
    assert [path.name for path in settings.files.iterdir()] == [file.id]
    gone = client.delete(f"/v1/files/{file.id}")
    assert FileDeleted.model_validate(gone.json()).deleted
    assert list(settings.files.iterdir()) == []
    for answer in (
        client.get(f"/v1/files/{file.id}"),
        client.get(f"/v1/files/{file.id}/content"),
        client.delete(f"/v1/files/{file.id}"),
    ):
        error = error_of(answer, 404)
        assert error["message"] == f"No such File object: {file.id}"


@ON_SQLITE
def test_the_parts_may_come_in_any_order_and_pieces(client: TestClient) -> None:
    expires = [
        ('name="expires_after[seconds]"', b"3600"),
        ('name="expires_after[anchor]"', b"created_at"),
    ]
    body = form(CONTENT, *expires, PURPOSE)

    def byte_by_byte() -> Iterator[bytes]:
        for i in range(len(body)):
            yield body[i : i + 1]

    answer = client.post("/v1/files", content=byte_by_byte(), headers=TYPE)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert (made["filename"], made["bytes"]) == ("a", 5)
    assert 3599 <= made["expires_at"] - made["created_at"] <= 3601
    assert client.get(f"/v1/files/{made['id']}/content").content == b"hello"


@ON_SQLITE
def test_an_empty_file_is_a_file(client: TestClient) -> None:
    made = send(client, b"").json()
    assert made["bytes"] == 0
    assert client.get(f"/v1/files/{made['id']}/content").content == b""


@ON_SQLITE
def test_exactly_the_limit(client: TestClient) -> None:
    assert send(client, b"x" * LIMIT).status_code == 200
    assert error_of(send(client, b"x" * (LIMIT + 1)), 413)["code"] == "file_too_large"


MALFORMED = {
    "no purpose": (form(CONTENT), 400, "purpose"),
    "no file": (form(PURPOSE), 400, "file"),
    "a file that is none": (form(PURPOSE, ('name="file"', b"x")), 400, "file"),
    "two files": (form(PURPOSE, CONTENT, CONTENT), 400, "file"),
    "a purpose twice": (form(PURPOSE, PURPOSE, CONTENT), 400, "purpose"),
    "an unknown field": (form(PURPOSE, ('name="user"', b"me"), CONTENT), 400, "user"),
    "a long field": (form(('name="purpose"', b"x" * 2_000), CONTENT), 400, "purpose"),
    "another purpose": (form(('name="purpose"', b"fine-tune"), CONTENT), 400, "purpose"),
    "a purpose that is not text": (form(('name="purpose"', b"\xff\0"), CONTENT), 400, "purpose"),
    "half a life": (
        form(PURPOSE, ('name="expires_after[seconds]"', b"3600"), CONTENT),
        400,
        "expires_after.anchor",
    ),
    "a life of words": (
        form(
            PURPOSE,
            ('name="expires_after[anchor]"', b"created_at"),
            ('name="expires_after[seconds]"', b"\xd9\xa3600"),
            CONTENT,
        ),
        400,
        "expires_after.seconds",
    ),
    "a long filename": (form(PURPOSE, (f'name="file"; filename="{"x" * 600}"', b"x")), 400, "file"),
    "no name": (form(PURPOSE, ("x=y", b"x")), 400, None),
    "an attachment": (form(PURPOSE).replace(b"form-data", b"attachment"), 400, None),
    "no end": (form(PURPOSE, CONTENT, end=b""), 400, None),
    "nothing": (b"", 400, None),
    "no boundary": (b"hello", 400, None),
    "another boundary": (form(PURPOSE, CONTENT).replace(b"--x", b"--y"), 400, None),
    "endless headers": (b"--x\r\n" + b"A: b\r\n" * 5_000, 400, None),
    "a long header": (b"--x\r\nA: " + b"b" * 30_000, 400, None),
}


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("name", MALFORMED)
def test_a_bad_form_is_refused_and_leaves_nothing(door: TestClient, name: str) -> None:
    body, status, param = MALFORMED[name]
    error = error_of(door.post("/v1/files", content=body, headers=TYPE), status)
    assert error["param"] == param


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json"},
        {"content-type": ""},
        {**TYPE, "content-encoding": "gzip"},
    ],
)
def test_only_a_plain_form_is_read(door: TestClient, headers: dict[str, str]) -> None:
    assert error_of(door.post("/v1/files", content=form(PURPOSE, CONTENT), headers=headers), 415)


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9", "http://[::1", ""])
def test_a_web_page_of_elsewhere_cannot_fill_the_disk(door: TestClient, origin: str) -> None:
    answer = door.post("/v1/files", content=form(PURPOSE, CONTENT), headers={**TYPE, "origin": origin})
    assert error_of(answer, 403)["code"] == "cross_origin"


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("boundary", ["", "; boundary=", f"; boundary={'x' * 100}"])
def test_a_boundary_is_needed(door: TestClient, boundary: str) -> None:
    headers = {"content-type": f"multipart/form-data{boundary}"}
    assert error_of(door.post("/v1/files", content=form(PURPOSE), headers=headers), 400)


def test_a_tenant_without_room(client: TestClient, database: Database, settings: Settings) -> None:
    Tenants(database).change(DEFAULT, quotas={"stored_bytes": 1_000})
    error = error_of(send(client, b"x" * 1_001), 429)
    assert error["code"] == "quota_exceeded"
    assert list(settings.files.iterdir()) == []
    assert send(client, b"x" * 1_000).status_code == 200
    refused = send(client, b"")
    assert refused.headers["x-should-retry"] == "false"
    assert error_of(refused, 429)
    assert len(list(settings.files.iterdir())) == 1


def a_request(chunks: Iterable[bytes | None]) -> Request:
    """A POST whose body comes in these pieces; None: the client leaves; after the last one nothing ever comes."""
    messages = iter(
        {"type": "http.disconnect"}
        if chunk is None
        else {"type": "http.request", "body": chunk, "more_body": True}
        for chunk in chunks
    )

    async def next_message() -> Any:
        message = next(messages, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", TYPE["content-type"].encode())]}
    return Request(scope, next_message)


def test_a_client_that_leaves_or_falls_silent_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    half = form(PURPOSE, CONTENT)[:-12]
    with pytest.raises(ClientDisconnect):
        asyncio.run(receive(a_request([half, None]), store, max_bytes=LIMIT))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(upload, "IDLE_SECONDS", 0.01)
    with pytest.raises(upload.ApiError) as caught:
        asyncio.run(receive(a_request([half]), store, max_bytes=LIMIT))
    assert caught.value.status == 408
    assert list(tmp_path.iterdir()) == []

    async def stopped() -> None:
        monkeypatch.setattr(upload, "IDLE_SECONDS", 60.0)
        task = asyncio.create_task(receive(a_request([half]), store, max_bytes=LIMIT))
        while not list(tmp_path.iterdir()):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stopped())
    assert list(tmp_path.iterdir()) == []


OPEN_FILE = form(PURPOSE, CONTENT, end=b"")[:-2]
ENDLESS = {  # how a body begins, what follows without end, and where that shows
    "file": (OPEN_FILE, b"x" * 10_000, 413, LIMIT),
    "preamble": (b"", b"\r\n" * 5_000, 413, LIMIT + upload.FORM_BYTES),
    "epilogue": (form(PURPOSE, CONTENT), b"x" * 10_000, 413, LIMIT + upload.FORM_BYTES),
    "field": (form(PURPOSE, end=b"")[:-2], b"x" * 10_000, 400, 0),
    "wrong purpose": (form(('name="purpose"', b"vision"), end=b"--x\r\n"), b"x" * 10_000, 400, 0),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_body_is_cut_while_it_arrives(tmp_path: Path, name: str) -> None:
    start, more, status, limit = ENDLESS[name]
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield start
        while sent < 100 * LIMIT:
            sent += len(more)
            yield more

    with pytest.raises((upload.ApiError, BadField)) as caught:
        asyncio.run(receive(a_request(endless()), FileStore(tmp_path), max_bytes=LIMIT))
    assert getattr(caught.value, "status", 400) == status
    assert sent <= limit + 2 * len(more)
    assert list(tmp_path.iterdir()) == []


@ON_SQLITE
@pytest.mark.parametrize("method", ["write", "keep"])
def test_a_full_disk_is_said_to_be_full(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Part, method, full)
    answer = send(client, b"x" * 50_000)
    assert error_of(answer, 507)["code"] == "storage_full"
    assert answer.headers["x-should-retry"] == "false"
    assert list(settings.files.iterdir()) == []


def test_pages(client: TestClient) -> None:
    ids = [send(client, b"x").json()["id"] for _ in range(5)]
    page = client.get("/v1/files", params={"limit": 2}).json()
    assert [one["id"] for one in page["data"]] == ids[:2:-1]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == (
        "list",
        ids[4],
        ids[3],
        True,
    )
    rest = client.get("/v1/files", params={"after": ids[3], "purpose": "batch", "limit": 10_000}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2::-1], False)
    assert client.get("/v1/files?order=asc").json()["data"][0]["id"] == ids[0]
    empty = client.get("/v1/files?purpose=batch_output").json()
    assert (empty["data"], empty["first_id"]) == ([], None)
    for query, param in (
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("order=up", "order"),
        ("after=file-unknown", "after"),
        ("page=2", "page"),
        ("limit=1&limit=2", "limit"),
    ):
        assert error_of(client.get(f"/v1/files?{query}"), 400)["param"] == param


@ON_SQLITE
def test_expired_files_are_not_found(client: TestClient, database: Database) -> None:
    file_id = send(client, b"x").json()["id"]
    with database.write() as connection:
        connection.execute(update(File).values(expires_at=now()))
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert error_of(client.get(path), 404)
    assert client.get("/v1/files").json()["data"] == []


@ON_SQLITE
def test_bytes_that_an_operator_has_removed(client: TestClient, settings: Settings) -> None:
    file_id = send(client, b"x").json()["id"]
    (settings.files / file_id).unlink()
    assert error_of(client.get(f"/v1/files/{file_id}/content"), 500)["code"] == "file_lost"
    assert client.delete(f"/v1/files/{file_id}").status_code == 200
