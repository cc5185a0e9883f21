"""Files: what a tenant has uploaded and what batches have put out, as rows beside the bytes on disk.

Owns the files table, its share of the tenant's stored bytes, and the end of a file: deleted, expired, or left over by
a process that died. A file exists when its row has committed, which is after its bytes are safe (`jobs.file_store`);
it ends when it is deleted or its time has come, and is not found any more; its bytes stay while a batch that has not
ended needs them. Its row stays for an hour, emptied, as a place in lists: who deletes what it lists must be able to
go on behind it. Refuses to know HTTP and what a file says.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, delete, exists, insert, or_, select, update

from jobs import tallies
from jobs.bad_field import BadField
from jobs.database import Database, was_committed
from jobs.dialects import clock, now, portions
from jobs.file_store import FileStore, Part
from jobs.keyset import Direction, page
from jobs.models import Batch, File
from jobs.quotas import Load, open_room
from jobs.settings import Settings
from jobs.tenants import Owner

log = logging.getLogger(__name__)

MAX_FILENAME_CHARS: Final = 512
SHORTEST_LIFE, LONGEST_LIFE = 3_600, 2_592_000  # seconds, as OpenAI has them
# An upload or an output takes less, from write to write and from name to row.
LEFTOVER_SECONDS: Final = 3_600.0
PLACE_SECONDS: Final = 3_600.0  # that the row of a file stays behind its end
ENDS_PER_SWEEP: Final = 500
GONE: Final = "gone"  # the purpose of a row that is only a place
_EMPTIED: Final = {"purpose": GONE, "bytes": 0, "filename": ""}
# OpenAI's list; here they have nothing to be used for.
OTHER_PURPOSES: Final = frozenset({"assistants", "evals", "fine-tune", "user_data", "vision"})


class Purpose(StrEnum):
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


class FileInUse(Exception):
    """A batch that has not ended needs the file."""

    code = "file_in_use"

    def __init__(self, batch_id: str) -> None:
        self.message = f"the batch {batch_id} still needs this file; wait for its end or cancel it"
        super().__init__(self.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileView:
    """`bytes`: its size. Times in unix seconds."""

    id: str
    purpose: str
    filename: str
    bytes: int
    created_at: float
    expires_at: float | None


def check_purpose(purpose: object) -> Purpose:
    """What an upload may be for. Raises `BadField`."""
    if purpose == Purpose.BATCH:
        return Purpose.BATCH
    if isinstance(purpose, str) and purpose in OTHER_PURPOSES:
        raise BadField("purpose", f"{purpose} is not offered here; files are the input of batches: batch")
    if purpose == Purpose.BATCH_OUTPUT:
        raise BadField("purpose", "batch_output is what batches make; only batch can be uploaded")
    raise BadField("purpose", "must be batch")


def check_life(anchor: object, seconds: object, *, param: str = "expires_after") -> int:
    """Seconds of OpenAI's `{"anchor": "created_at", "seconds": …}`. Raises `BadField`."""
    if anchor != "created_at":
        raise BadField(f"{param}.anchor", "must be created_at")
    if (
        not isinstance(seconds, int)
        or isinstance(seconds, bool)
        or not SHORTEST_LIFE <= seconds <= LONGEST_LIFE
    ):
        raise BadField(f"{param}.seconds", f"must be an integer from {SHORTEST_LIFE} to {LONGEST_LIFE}")
    return seconds


def insert_file(
    connection: Connection,
    file_id: str,
    *,
    owner: Owner,
    purpose: Purpose,
    filename: str,
    size: int,
    seconds: int | None,
) -> tallies.Change:
    """The row of a file whose bytes are safe, inserted once however often this runs. What it changes of the tenant's
    sums is the caller's to add, last in its transaction."""
    if was_committed(connection, File.id, file_id):
        return tallies.Change(owner.tenant)
    time_now = clock(connection)
    connection.execute(
        insert(File).values(
            id=file_id,
            tenant=owner.tenant,
            key_id=owner.key_id,
            purpose=purpose,
            filename=filename,
            bytes=size,
            created_at=time_now,
            expires_at=None if seconds is None else time_now + seconds,
        )
    )
    return tallies.Change(owner.tenant, stored_bytes=size)


def find_file(connection: Connection, file_id: str, *, tenant: str, lock: bool = False) -> FileView | None:
    """The tenant's file; `lock` keeps it from being deleted until the transaction ends."""
    query = select(*File.__table__.columns).where(File.id == file_id, *_theirs(tenant))
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return None if row is None else _view(row)


class Files:
    """Another tenant's file is answered like one that does not exist."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self.store = FileStore(settings.files)

    def check_room(self, tenant: str, size: int) -> None:
        """Refuse a hopeless upload before it is on disk; what counts is asked again in `keep`.

        Raises `QuotaExceeded`."""
        load = Load(jobs=0, tokens=0, stored_bytes=max(1, size))
        self._database.transact(lambda connection: open_room(connection, tenant, self._settings).take(load))

    def keep(self, part: Part, *, owner: Owner, filename: str, seconds: int | None) -> FileView:
        """Make an upload a file. Raises `QuotaExceeded`, after which there is none; `seconds`: its life."""
        part.keep()
        load = Load(jobs=0, tokens=0, stored_bytes=part.size)

        def work(connection: Connection) -> FileView:
            known = find_file(connection, part.file_id, tenant=owner.tenant)
            if known is not None:  # committed before the connection was lost
                return known
            open_room(connection, owner.tenant, self._settings).take(load)
            change = insert_file(
                connection,
                part.file_id,
                owner=owner,
                purpose=Purpose.BATCH,
                filename=filename,
                size=part.size,
                seconds=seconds,
            )
            tallies.add(connection, [change])
            made = find_file(connection, part.file_id, tenant=owner.tenant)
            assert made is not None
            return made

        return self._database.transact(work)

    def find(self, file_id: str, *, tenant: str) -> FileView | None:
        with self._database.read() as connection:
            return find_file(connection, file_id, tenant=tenant)

    def page(
        self, *, tenant: str, purpose: str | None, after: str | None, limit: int, direction: Direction
    ) -> tuple[list[FileView], bool]:
        """A page of files by time of creation, and whether more follow. `after`: the last id of the page before.
        Raises `BadField` when there is no such file."""
        query = select(*File.__table__.columns).where(*_theirs(tenant))
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        with self._database.read() as connection:
            # The edge may have expired meanwhile: a list that is being read must not break off.
            rows, more = page(
                connection,
                query,
                File,
                tenant=tenant,
                noun="file",
                after=after,
                limit=limit,
                direction=direction,
            )
        return [_view(row) for row in rows], more

    def delete(self, file_id: str, *, tenant: str) -> bool:
        """False when there is no such file. Raises `FileInUse`."""
        seen: list[FileView] = []  # by this call's tries

        def work(connection: Connection) -> bool:
            file = find_file(connection, file_id, tenant=tenant, lock=True)
            if file is None:
                return bool(seen)  # deleted before the connection was lost
            seen.append(file)
            user = connection.scalars(
                select(Batch.id).where(Batch.input_file_id == file_id, Batch.finished_at.is_(None)).limit(1)
            ).first()
            if user is not None:
                raise FileInUse(user)
            connection.execute(update(File).where(File.id == file_id).values(expires_at=now(), **_EMPTIED))
            tallies.add(connection, [tallies.Change(tenant, stored_bytes=-file.bytes)])
            return True

        found = self._database.transact(work)
        if found:
            self.store.remove(file_id)  # if this fails, it is a leftover
        return found

    # --- repairs, by any api process ------------------------------------------------------------------------

    def end_expired(self) -> int:
        """Remove files whose time has come and that no batch needs; how many. Their rows go in a later call."""
        with self._database.read() as connection:
            expired = _expired(clock(connection))
            if not any(connection.execute(some.limit(1)).first() for some in expired):
                return 0

        full, emptied = (
            some.order_by(File.id).limit(ENDS_PER_SWEEP).with_for_update(skip_locked=True, of=File)
            for some in expired
        )

        def work(connection: Connection) -> list[str]:
            old = [row.id for row in connection.execute(emptied)]
            connection.execute(delete(File).where(File.id.in_(old)))
            gone = connection.execute(full).all()
            ids = [row.id for row in gone]
            connection.execute(update(File).where(File.id.in_(ids)).values(_EMPTIED))
            tallies.add(connection, [tallies.Change(row.tenant, stored_bytes=-row.bytes) for row in gone])
            return ids

        ended = self._database.transact(work)
        for file_id in ended:
            self.store.remove(file_id)
        return len(ended)

    def clean(self) -> int:
        """Remove from disk what dead processes left: parts, and files without a row, untouched for
        `LEFTOVER_SECONDS`."""
        old = list(self.store.old(LEFTOVER_SECONDS))
        for file_id, whole in old:
            if not whole:
                self.store.remove_part(file_id)
        whole_ids = [file_id for file_id, whole in old if whole]
        removed = len(old) - len(whole_ids)
        for some in portions(whole_ids):
            with self._database.read() as connection:
                known = set(connection.scalars(select(File.id).where(File.id.in_(some))))
            for file_id in set(some) - known:
                self.store.remove(file_id)
                removed += 1
        if removed:
            log.warning("files.cleaned leftovers=%d", removed)
        return removed


def _expired(time_now: float) -> tuple[Select[Any], Select[Any]]:
    """Rows of files that are to be removed, and of those that were and whose places are needed no more."""
    needed = exists().where(Batch.input_file_id == File.id, Batch.finished_at.is_(None))
    rows = select(*File.__table__.columns)
    return (
        rows.where(File.expires_at <= time_now, File.purpose != GONE, ~needed),
        rows.where(File.expires_at <= time_now - PLACE_SECONDS, File.purpose == GONE),
    )


def _theirs(tenant: str) -> tuple[ColumnElement[bool], ...]:
    return File.tenant == tenant, or_(File.expires_at.is_(None), File.expires_at > now())


def _view(row: Any) -> FileView:
    return FileView(
        id=row.id,
        purpose=row.purpose,
        filename=row.filename,
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
