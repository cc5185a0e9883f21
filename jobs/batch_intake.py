"""BatchIntake: the second pass over a batch's input file: its lines become jobs, a chunk per transaction.

Owns the insertion and its end. Each transaction inserts one chunk and moves the batch's `num_inserted` and
`next_offset`, with the batch's row locked, so that a pass that is cut short goes on exactly there in another process,
and no line becomes two jobs. Jobs run as soon as their chunk is committed. What the tenant's sums hold for the lines
that are left was taken when the batch began; a chunk turns a part of that reserve into jobs, and whoever stops the
insertion gives the rest back. Lines of a model whose jobs somebody has cancelled meanwhile (`jobs.cancels`) become
cancelled jobs. Ids follow from the batch's id and the line's place: a repeated insert would fail,
never double.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Final

from sqlalchemy import Connection, select, update

from jobs import tallies
from jobs.bad_field import BadField
from jobs.batch_check import FILE_LOST
from jobs.batch_file import BadLine, bounded_lines, is_blank, parse_line
from jobs.batches import close_batches
from jobs.completion_window import terms_of_window
from jobs.database import Database, commit_lazily
from jobs.desk import BatchLease
from jobs.dialects import now
from jobs.drafts import Draft, DraftFile, Drafts, by_column, draft_of, joined
from jobs.file_store import FileStore
from jobs.job_rows import ReadyRows, columns_of, shared_columns
from jobs.line_check import BLOCK_BYTES, max_line_bytes
from jobs.models import Batch, Job
from jobs.quotas import Load
from jobs.settings import Settings
from jobs.states import BatchState, JobState
from jobs.tenants import Owner

CHUNK: Final = 2_000  # lines per transaction
CHUNK_BYTES: Final = 8_000_000  # of lines, whichever comes first


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`num_before`, `num_inserted`: of the batch, before its jobs are in and then; `end` where the next chunk begins
    in the file."""

    jobs: ReadyRows
    load: Load
    models: frozenset[str]
    num_before: int
    num_inserted: int
    end: int
    last: bool


def job_id_of(batch_id: str, position: int) -> str:
    """Of a line's job: its batch's time and random digits around the line's place."""
    digits = batch_id.removeprefix("batch_")
    return f"job_{digits[:12]}{position:08x}{digits[20:]}"


def stop_inserting(connection: Connection, batch: Any) -> tallies.Change:
    """No further line of this batch becomes a job. `batch`: its row, locked. What that gives back of the tenant's
    sums is the caller's to add."""
    if batch.next_offset is None:
        return tallies.Change(batch.tenant)
    connection.execute(
        update(Batch)
        .where(Batch.id == batch.id)
        .values(next_offset=None, reserved_tokens=0, reserved_bytes=0)
    )
    return tallies.Change(
        batch.tenant,
        jobs=batch.num_inserted - batch.total,
        tokens=-batch.reserved_tokens,
        stored_bytes=-batch.reserved_bytes,
    )


class BatchIntake:
    """`announce(model)` is called after each chunk's commit."""

    def __init__(
        self, database: Database, settings: Settings, store: FileStore, announce: Callable[[str], None]
    ) -> None:
        self._database = database
        self._settings = settings
        self._store = store
        self._announce = announce

    def insert(self, lease: BatchLease, drafts: DraftFile | None = None) -> None:
        """Go on until every line has its job, or the batch was cancelled or has expired, or the database has lost
        what it was told: then whoever has the batch next goes on from what is there. `drafts`: what the check has
        just made of all lines, if it was in this process. Raises `LeaseLost`."""
        with self._database.read() as connection:
            batch = connection.execute(
                select(*Batch.__table__.columns).where(Batch.id == lease.batch_id)
            ).one()
        if batch.next_offset is None:
            return
        try:
            with (
                self._store.open(batch.input_file_id) as file,
                closing(_one_ahead(self._chunks(batch, self._drafts(file, batch, drafts)))) as chunks,
            ):
                for chunk in chunks:
                    lease.check()
                    if not self._database.transact(partial(_insert, lease=lease, chunk=chunk)):
                        return
                    for model in chunk.models:
                        self._announce(model)
                    if chunk.last:
                        return
        except (FileNotFoundError, BadLine, BadField):
            pass
        # The file has passed the check and is not what it was: what has become jobs goes on, the rest cannot.
        self._database.transact(partial(_give_up, lease=lease))

    def _drafts(self, file: BinaryIO, batch: Any, drafts: DraftFile | None) -> Iterator[Drafts]:
        """What is left to insert."""
        if drafts is not None and drafts.whole and batch.next_offset == 0:
            yield from drafts
            return
        end = begin = batch.next_offset
        file.seek(end)
        rows: list[tuple[int, Draft]] = []
        for raw in bounded_lines(file, max_line_bytes(self._settings)):
            if raw is None:
                return
            number = 1 if end == 0 else 2
            end += len(raw)
            if not is_blank(raw):
                line = parse_line(number, raw, batch.endpoint)
                rows.append((end, draft_of(line.named_job(self._settings, checked=True), self._settings)))
            if rows and (len(rows) == CHUNK or end - begin >= BLOCK_BYTES):
                yield by_column(rows)
                rows, begin = [], end
        if rows:
            yield by_column(rows)

    def _chunks(self, batch: Any, blocks: Iterator[Drafts]) -> Iterator[_Chunk]:
        shared = shared_columns(
            Owner(batch.tenant, batch.key_id),
            source="http",
            terms=terms_of_window(batch.completion_window, submitted_at=batch.created_at),
            batch_id=batch.id,
        )
        dialect = self._database.engine.dialect.name
        first = batch.num_inserted
        for drafts in _cut(blocks, batch.next_offset, batch.total - first):
            positions = range(first, first + len(drafts.ends))
            ids = [job_id_of(batch.id, position) for position in positions]
            first = positions.stop
            yield _Chunk(
                ReadyRows(dialect, columns_of(ids, drafts, positions, shared)),
                Load(len(ids), sum(drafts.estimated_tokens), sum(map(len, drafts.bodies))),
                frozenset(drafts.models),
                positions.start,
                first,
                drafts.ends[-1],
                first == batch.total,
            )


def _cut(blocks: Iterator[Drafts], begin: int, left: int) -> Iterator[Drafts]:
    """The first `left` of these drafts, as many at a time as one transaction should insert. `begin`: the byte of the
    file at which they begin."""
    held: list[Drafts] = []
    room = CHUNK
    for block in blocks:
        start = 0
        while left and start < len(block.ends):
            full_at = bisect_left(block.ends, begin + CHUNK_BYTES, start) + 1
            stop = min(len(block.ends), full_at, start + room, start + left)
            held.append(block.part(start, stop))
            room -= stop - start
            left -= stop - start
            start = stop
            if not room or not left or stop == full_at:
                begin = block.ends[stop - 1]
                yield joined(held)
                held, room = [], CHUNK
        if not left:
            return


def _one_ahead(chunks: Iterator[_Chunk]) -> Generator[_Chunk, None, None]:
    """The same chunks, each made while the database has the one before."""
    with ThreadPoolExecutor(1, thread_name_prefix="chunks") as maker:
        coming = maker.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = maker.submit(next, chunks, None)
            yield chunk


def _give_up(connection: Connection, lease: BatchLease) -> None:
    batch = lease.locked(connection)
    if batch.next_offset is None:
        return
    change = stop_inserting(connection, batch)
    connection.execute(update(Batch).where(Batch.id == batch.id).values(errors=[FILE_LOST]))
    close_batches(connection, [batch.id])
    tallies.add(connection, [change])


def _insert(connection: Connection, lease: BatchLease, chunk: _Chunk) -> bool:
    """False when nothing more is to be inserted, or not from here."""
    batch = lease.locked(connection)
    if batch.num_inserted == chunk.num_inserted:
        return True  # committed before the connection was lost
    if batch.num_inserted != chunk.num_before:
        return False  # a crash took chunks along that had been committed lazily
    if batch.next_offset is None or batch.state != BatchState.IN_PROGRESS:
        return False
    if batch.expires_at is not None and batch.expires_at <= batch.time_now:
        change = stop_inserting(connection, batch)
        close_batches(connection, [batch.id])
        tallies.add(connection, [change])
        return False
    if not chunk.last:
        commit_lazily(connection)  # whatever of it were lost would be inserted again
    chunk.jobs.insert(connection)
    left_tokens = batch.reserved_tokens - chunk.load.tokens
    left_bytes = batch.reserved_bytes - chunk.load.stored_bytes
    connection.execute(
        update(Batch)
        .where(Batch.id == batch.id)
        .values(
            num_inserted=chunk.num_inserted,
            next_offset=None if chunk.last else chunk.end,
            reserved_tokens=0 if chunk.last else left_tokens,
            reserved_bytes=0 if chunk.last else left_bytes,
        )
    )
    changes = _cancel_at_birth(connection, batch, chunk)
    if changes and chunk.last:
        close_batches(connection, [batch.id])  # nothing of it may be open
    if chunk.last:
        # Zero, unless the process that checked estimated by other settings than this one.
        changes.append(tallies.Change(batch.tenant, tokens=-left_tokens, stored_bytes=-left_bytes))
    tallies.add(connection, changes)
    return True


def _cancel_at_birth(connection: Connection, batch: Any, chunk: _Chunk) -> list[tallies.Change]:
    """What the jobs of cancelled models leave the tenant's sums. `batch`: its row, locked, from before the chunk."""
    models = chunk.models.intersection(batch.cancelled_models or ())
    if not models:
        return []
    born = (Job.batch_id == batch.id, Job.position >= batch.num_inserted, Job.model.in_(sorted(models)))
    ended = connection.execute(
        update(Job)
        .where(*born, Job.state == JobState.QUEUED)
        .values(state=JobState.CANCELLED, finished_at=now())
        .returning(Job.estimated_tokens)
    )
    return [tallies.ended(batch.tenant, row.estimated_tokens) for row in ended]
