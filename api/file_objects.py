"""Objects of files, as clients see them: OpenAI's.

Owns the shape of answers and nothing of their making.
"""

from __future__ import annotations

from typing import Literal

from api.schemas import Named, Object, PageObject, whole_seconds
from jobs.files import FileView


class FileObject(Named):
    """OpenAI's object. `status` is always processed: a file that exists is whole."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(PageObject[FileObject]):
    pass


class FileDeleted(Object):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_object(file: FileView) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=whole_seconds(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
    )
