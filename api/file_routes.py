"""File routes: OpenAI's files: upload, list, look at, fetch, delete.

Owns the HTTP side of a file. An upload is answered when its bytes are safe and its row is committed; a download is
streamed from disk in pieces. Refuses to know what a file says.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Annotated, BinaryIO, Final
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from api import upload
from api.auth import BEARER, By
from api.errors import ApiError, no_such_file
from api.file_objects import FileDeleted, FileList, FileObject, file_object
from api.parameters import is_id, refuse_query, refuse_repeats
from api.schemas import REFUSALS
from api.services import Services
from jobs.bad_field import BadField
from jobs.files import FileView
from jobs.keyset import Direction
from jobs.quotas import QuotaExceeded
from jobs.tenants import Owner
from jobs.texts import Name

MAX_LIMIT: Final = 10_000
_PIECE_BYTES: Final = 1 << 18


class FileQuery(BaseModel):
    """The query string of GET /v1/files."""

    model_config = ConfigDict(extra="forbid")

    purpose: Annotated[Name, Field(max_length=32)] | None = None
    after: Annotated[Name, Field(max_length=255)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)] = MAX_LIMIT
    order: Direction = "desc"


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1/files",
        tags=["files"],
        dependencies=[Depends(BEARER)],
        responses=REFUSALS,
    )
    files = services.files

    @router.post("", dependencies=[Depends(refuse_query)])
    async def create_file(request: Request, caller: By) -> FileObject:
        """A multipart form of `purpose`, `file` and perhaps `expires_after[anchor]` and `expires_after[seconds]`."""
        announced = upload.announced_bytes(request)
        await run_in_threadpool(files.check_room, caller.tenant, announced)
        received = await upload.receive(request, files.store, max_bytes=services.settings.max_file_bytes)
        return file_object(await run_in_threadpool(_keep, services, caller.owner, received))

    @router.get("", dependencies=[Depends(refuse_repeats)])
    def list_files(query: Annotated[FileQuery, Query()], caller: By) -> FileList:
        """A page of files. `after` is the `last_id` of the page before."""
        found, has_more = files.page(
            tenant=caller.tenant,
            purpose=query.purpose,
            after=query.after,
            limit=query.limit,
            direction=query.order,
        )
        return FileList.of([file_object(file) for file in found], has_more)

    @router.get("/{file_id}", dependencies=[Depends(refuse_query)])
    def get_file(file_id: str, caller: By) -> FileObject:
        return file_object(_file(services, caller.tenant, file_id))

    @router.get("/{file_id}/content", dependencies=[Depends(refuse_query)], response_class=StreamingResponse)
    def get_content(file_id: str, caller: By) -> StreamingResponse:
        file = _file(services, caller.tenant, file_id)
        try:
            content = files.store.open(file.id)
        except FileNotFoundError:
            if files.find(file.id, tenant=caller.tenant) is None:  # deleted in this very moment
                raise no_such_file(file_id) from None
            message = "the bytes of this file are gone from the server's disk"
            raise ApiError(500, message, code="file_lost", headers={"x-should-retry": "false"}) from None
        headers = {
            "Content-Length": str(file.bytes),
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
            "X-Content-Type-Options": "nosniff",
        }
        return FileStream(content, headers)

    @router.delete("/{file_id}", dependencies=[Depends(refuse_query)])
    def delete_file(file_id: str, caller: By) -> FileDeleted:
        """Refused with 409 while a batch that has not ended needs the file."""
        if not is_id(file_id) or not files.delete(file_id, tenant=caller.tenant):
            raise no_such_file(file_id)
        return FileDeleted(id=file_id)

    return router


class FileStream(StreamingResponse):
    """Closes the file however the download ends."""

    def __init__(self, content: BinaryIO, headers: dict[str, str]) -> None:
        super().__init__(_pieces(content), headers=headers, media_type="application/octet-stream")
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._content.close()


def _keep(services: Services, owner: Owner, received: upload.Upload) -> FileView:
    part = received.part
    try:
        return services.files.keep(part, owner=owner, filename=received.filename, seconds=received.seconds)
    except (QuotaExceeded, BadField):
        part.drop()
        raise
    except OSError as error:
        part.drop()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise upload.no_space() from None
        raise


def _file(services: Services, tenant: str, file_id: str) -> FileView:
    file = services.files.find(file_id, tenant=tenant) if is_id(file_id) else None
    if file is None:
        raise no_such_file(file_id)
    return file


def _pieces(content: BinaryIO) -> Iterator[bytes]:
    while piece := content.read(_PIECE_BYTES):
        yield piece
