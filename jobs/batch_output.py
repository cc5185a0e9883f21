"""BatchOutput: what came out of a batch of a file, written as OpenAI's two files.

Owns the last step of such a batch: one line per request, in input order, answers in the output file and everything
else in the error file, neither of them made when it would be empty. Lines are read from SQL a chunk at a time and
their ids follow from the jobs', so whoever repeats this writes the same. Rows of both files and the batch's final
state are one commit: a client sees all of it or nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, select, update

from jobs import tallies
from jobs.batch_check import FILE_LOST
from jobs.batch_file import BadLine, bounded_lines, is_blank, output_line, parse_line, response
from jobs.batch_intake import job_id_of
from jobs.database import Database
from jobs.desk import BatchLease, LeaseLost
from jobs.dialects import now
from jobs.failures import failure_of
from jobs.file_store import FileStore, Part
from jobs.files import Purpose, insert_file
from jobs.line_check import max_line_bytes
from jobs.models import Batch
from jobs.openai_answers import answer_id, completion_object, error_object, usage_object
from jobs.openai_body import Url
from jobs.reads import JobView, Reads
from jobs.settings import Settings
from jobs.states import BatchState, JobState
from jobs.tenants import Owner

_NOT_RUN: Final = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not completed before the batch was cancelled.",
    "request_cancelled": "This request was cancelled on its own, not with its batch.",
    FILE_LOST["code"]: FILE_LOST["message"],
}


def line_of(job: JobView, url: Url, *, cancelled: bool) -> bytes:
    """The line of a job that has ended; `cancelled`: its whole batch."""
    name = job.id.removeprefix("job_")
    if job.state is JobState.COMPLETED and job.usage is not None and job.finished_at is not None:
        body = completion_object(
            url,
            job.outputs or [],
            answer_id=answer_id(url, name),
            created=int(job.finished_at),
            model=job.model,
            usage=usage_object(job.usage.prompt, job.usage.completion, job.usage.cached, job.outputs),
        )
        return output_line(name, job.custom_id, response(name, 200, body))
    if job.state is JobState.FAILED:
        failure = failure_of(job)
        assert failure is not None
        status, code, message, param = failure
        body = error_object(status, message, code=code, param=param)
        return output_line(name, job.custom_id, response(name, status, body))
    if job.state is JobState.EXPIRED:
        return _not_run(name, job.custom_id, "batch_expired")
    return _not_run(name, job.custom_id, "batch_cancelled" if cancelled else "request_cancelled")


def _not_run(name: str, custom_id: str | None, code: str) -> bytes:
    return output_line(name, custom_id, None, {"code": code, "message": _NOT_RUN[code]})


class _Sheets:
    """The two files while they are written. `num_expired`: lines that came too late."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self.parts: dict[str, Part] = {}
        self.num_expired = 0

    def write(self, kind: str, line: bytes) -> None:
        if kind not in self.parts:
            self.parts[kind] = self._store.begin()
        self.parts[kind].write(line)

    def drop(self) -> None:
        for part in self.parts.values():
            part.drop()


class BatchOutput:
    def __init__(self, database: Database, settings: Settings, store: FileStore) -> None:
        self._database = database
        self._settings = settings
        self._store = store
        self._reads = Reads(database)

    def finish(self, lease: BatchLease) -> None:
        """Write both files and close the batch. Raises `LeaseLost`, and `OSError` when the disk is full."""
        with self._database.read() as connection:
            batch = connection.execute(
                select(*Batch.__table__.columns).where(Batch.id == lease.batch_id)
            ).one()
        sheets = _Sheets(self._store)
        try:
            for job in self._reads.results(batch.id, tenant=batch.tenant):
                lease.tick()
                kind = "output" if job.state is JobState.COMPLETED else "error"
                sheets.num_expired += job.state is JobState.EXPIRED
                sheets.write(kind, line_of(job, batch.endpoint, cancelled=batch.cancelling_at is not None))
            if batch.num_inserted < batch.total:
                self._write_rest(lease, batch, sheets)
            lease.check()
            for part in sheets.parts.values():
                part.keep()
        except BaseException:
            sheets.drop()
            raise
        try:
            self._database.transact(partial(_close, lease=lease, sheets=sheets))
        except LeaseLost:
            sheets.drop()
            raise
        # After any other failure the rows may be there though we were told that they are not: files that are without
        # one are cleaned up later (`jobs.files`).

    def _write_rest(self, lease: BatchLease, batch: Any, sheets: _Sheets) -> None:
        """The lines that never became jobs."""
        if batch.cancelling_at is not None:
            code = "batch_cancelled"
        else:
            code = str(FILE_LOST["code"]) if batch.errors else "batch_expired"
        sheets.num_expired += (batch.total - batch.num_inserted) * (code == "batch_expired")
        try:
            file = self._store.open(batch.input_file_id)
        except FileNotFoundError:
            return
        with file:
            position = 0
            for raw in bounded_lines(file, max_line_bytes(self._settings)):
                lease.tick()
                if raw is not None and is_blank(raw):
                    continue
                if position >= batch.num_inserted:
                    name = job_id_of(batch.id, position).removeprefix("job_")
                    sheets.write("error", _not_run(name, _custom_id(position, raw, batch.endpoint), code))
                position += 1


def _custom_id(position: int, raw: bytes | None, endpoint: str) -> str | None:
    try:
        return None if raw is None else parse_line(position + 1, raw, endpoint).custom_id
    except BadLine:
        return None


def _close(connection: Connection, lease: BatchLease, sheets: _Sheets) -> None:
    batch = lease.locked(connection)
    if batch.finished_at is not None:
        return
    if batch.state == BatchState.CANCELLING:
        state = BatchState.CANCELLED
    elif batch.errors:
        state = BatchState.FAILED
    elif sheets.num_expired and batch.expires_at is not None and batch.expires_at <= batch.time_now:
        state = BatchState.EXPIRED
    else:
        state = BatchState.COMPLETED
    changes = [
        insert_file(
            connection,
            part.file_id,
            owner=Owner(batch.tenant, batch.key_id),
            purpose=Purpose.BATCH_OUTPUT,
            filename=f"{batch.id}_{kind}.jsonl",
            size=part.size,
            seconds=batch.output_expires_seconds,
        )
        for kind, part in sheets.parts.items()
    ]
    ids = {f"{kind}_file_id": part.file_id for kind, part in sheets.parts.items()}
    connection.execute(
        update(Batch).where(Batch.id == batch.id).values(state=state, finished_at=now(), **ids)
    )
    tallies.add(connection, changes)
