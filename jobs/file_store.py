"""FileStore: the bytes of files on disk, in one folder that all api processes see.

Owns names and the order of writing: a file grows as `ID.part`, is synced, renamed to `ID`, and the folder is synced;
only then may its row be committed (`jobs.files`). So a file that has a row is whole, whatever died, and what has none
is a leftover. Names are made here, never by clients. Refuses to know tenants, quotas and what is in a file.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

_PART: Final = ".part"
_OURS: Final = re.compile(r"(file-[0-9a-f]{32})(\.part)?")


def new_file_id() -> str:
    """`file-` and 32 hex digits that sort by time: nanoseconds, so that two files of one batch keep their order also
    where the database's clock cannot tell them apart, and 64 random bits."""
    return f"file-{time.time_ns():016x}{secrets.token_hex(8)}"


class Part:
    """A file that is being written. End it with `keep` or `drop`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self.size = 0

    @property
    def file_id(self) -> str:
        return self._path.name.removesuffix(_PART)

    def write(self, data: bytes | bytearray) -> None:
        """Raises `OSError`, as when the disk is full."""
        self._file.write(data)
        self.size += len(data)

    def keep(self) -> None:
        """Make it a whole file that a power cut leaves whole."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.rename(self._path.with_name(self.file_id))
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def drop(self) -> None:
        """Also after `keep`, and twice."""
        try:
            self._file.close()
        except OSError:  # a full disk may refuse the last bytes once more
            pass
        for path in (self._path, self._path.with_name(self.file_id)):
            path.unlink(missing_ok=True)


class FileStore:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self) -> Part:
        """A new file under a new id. Raises `OSError`."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / f"{new_file_id()}{_PART}"
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        return Part(path, os.fdopen(number, "wb", buffering=1 << 20))

    def open(self, file_id: str) -> BinaryIO:
        """Raises `FileNotFoundError` when there is none, whatever `file_id` is."""
        return self._path(file_id).open("rb")

    def scratch(self) -> str:
        """A folder for files without a name, which nobody else sees."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return str(self._folder)

    def remove(self, file_id: str) -> None:
        """Whoever reads it reads on."""
        self._path(file_id).unlink(missing_ok=True)

    def old(self, seconds: float) -> Iterator[tuple[str, bool]]:
        """Files and parts that nobody has written to for so long: id, and whether it is whole. The clock is that of
        the disk, which other machines write to as well."""
        try:
            entries = list(os.scandir(self._folder))
            with tempfile.TemporaryFile(dir=self._folder) as fresh:
                time_now = os.fstat(fresh.fileno()).st_mtime
        except FileNotFoundError:
            return
        for entry in entries:
            found = _OURS.fullmatch(entry.name)
            if found is None:
                continue
            try:
                silent = time_now - entry.stat(follow_symlinks=False).st_mtime
            except FileNotFoundError:
                continue
            if silent > seconds:
                yield found[1], found[2] is None

    def remove_part(self, file_id: str) -> None:
        self._path(file_id).with_name(file_id + _PART).unlink(missing_ok=True)

    def _path(self, file_id: str) -> Path:
        found = _OURS.fullmatch(file_id)
        if found is None or found[2] is not None:
            raise FileNotFoundError(file_id)
        return self._folder / file_id
