"""FileBatches: batches that come as a file, from the request to the first job.

Owns OpenAI's `POST /v1/batches`: its fields, the row in state `validating`, and the two ways out of that state.
Refuses to know what is checked (`jobs.batch_check`), how lines become jobs (`jobs.batch_intake`) and HTTP.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, insert, select, update

from jobs import tallies
from jobs.bad_field import BadField
from jobs.batch_check import FILE_LOST, Findings, check_file
from jobs.batch_file import ENDPOINTS
from jobs.body import parse_metadata
from jobs.completion_window import window_seconds
from jobs.database import Database, was_committed
from jobs.desk import BatchLease
from jobs.dialects import clock, now
from jobs.drafts import DraftFile
from jobs.file_store import FileStore
from jobs.files import Purpose, check_life, find_file
from jobs.idempotency import Submit, earlier_target
from jobs.job_rows import new_id
from jobs.line_check import line_error
from jobs.line_checker import is_worth
from jobs.models import Batch, Worker
from jobs.quotas import QuotaExceeded, open_room
from jobs.settings import Settings
from jobs.states import BatchState
from jobs.tenants import Owner

_FIELDS: Final = frozenset(
    {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
)
# OpenAI's others, so that a refusal can say more than "unknown".
_OTHER_ENDPOINTS: Final = frozenset(
    f"/v1/{name}"
    for name in ("responses", "embeddings", "moderations", "images/generations", "images/edits", "videos")
)


class NoSuchFile(Exception):
    """The input is not there, or not this tenant's."""

    def __init__(self, file_id: str) -> None:
        self.file_id = file_id
        super().__init__(file_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a client asks for, checked as far as the file does not matter. `window`: seconds, None: no end."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window: float | None
    metadata: dict[str, str]
    output_expires_seconds: int | None


def parse_wish(data: object) -> Wish:
    """The body of a POST. Raises `BadField`."""
    if not isinstance(data, dict):
        raise BadField(None, "a batch must be a JSON object", "invalid_type")
    for name in data:
        if name not in _FIELDS:
            raise BadField(
                name, f"unknown field; allowed are {', '.join(sorted(_FIELDS))}", "unknown_parameter"
            )
    for name in ("input_file_id", "endpoint", "completion_window"):
        if data.get(name) is None:
            raise BadField(name, "is required", "missing_required_parameter")
        if not isinstance(data[name], str):
            raise BadField(name, "must be a string", "invalid_type")
    endpoint = data["endpoint"]
    if endpoint in _OTHER_ENDPOINTS:
        raise BadField("endpoint", f"{endpoint} is not offered here; there are {' and '.join(ENDPOINTS)}")
    if endpoint not in ENDPOINTS:
        raise BadField("endpoint", f"must be {' or '.join(ENDPOINTS)}")
    return Wish(
        input_file_id=data["input_file_id"],
        endpoint=endpoint,
        completion_window=data["completion_window"],
        window=window_seconds(data["completion_window"]),
        metadata=parse_metadata(data.get("metadata")),
        output_expires_seconds=_life(data.get("output_expires_after")),
    )


def _life(given: object) -> int | None:
    if given is None:
        return None
    if not isinstance(given, dict) or given.keys() != {"anchor", "seconds"}:
        raise BadField("output_expires_after", "must be an object of anchor and seconds", "invalid_type")
    return check_life(given["anchor"], given["seconds"], param="output_expires_after")


class FileBatches:
    def __init__(self, database: Database, settings: Settings, store: FileStore) -> None:
        self._database = database
        self._settings = settings
        self._store = store

    def create(self, wish: Wish, owner: Owner, submit: Submit | None = None) -> str:
        """The id of a new batch that is being validated, or of the one which the same `submit` made before. Raises
        `NoSuchFile`, `BadField` and `KeyReusedError`."""
        batch_id = new_id("batch")

        def work(connection: Connection) -> str:
            known = earlier_target(connection, submit, tenant=owner.tenant, target=batch_id)
            if known is not None:
                return known
            if was_committed(connection, Batch.id, batch_id):
                return batch_id
            # Locked: a file that is deleted meanwhile is either gone for us or kept by us.
            file = find_file(connection, wish.input_file_id, tenant=owner.tenant, lock=True)
            if file is None:
                raise NoSuchFile(wish.input_file_id)
            if file.purpose != Purpose.BATCH:
                raise BadField("input_file_id", "must be a file of purpose batch")
            time_now = clock(connection)
            connection.execute(
                insert(Batch).values(
                    id=batch_id,
                    tenant=owner.tenant,
                    key_id=owner.key_id,
                    state=BatchState.VALIDATING,
                    endpoint=wish.endpoint,
                    total=0,
                    info=wish.metadata,
                    created_at=time_now,
                    input_file_id=file.id,
                    completion_window=wish.completion_window,
                    expires_at=None if wish.window is None else time_now + wish.window,
                    output_expires_seconds=wish.output_expires_seconds,
                )
            )
            return batch_id

        return self._database.transact(work)

    def validate(self, lease: BatchLease, drafts: DraftFile | None = None) -> None:
        """Check the whole file, then let the batch begin or fail. `drafts`: as `check_file` takes them. Raises
        `LeaseLost`."""
        with self._database.read() as connection:
            batch = connection.execute(
                select(Batch.input_file_id, Batch.endpoint).where(Batch.id == lease.batch_id)
            ).one()
            known = frozenset(connection.scalars(select(Worker.model).distinct()))
        if known and self._settings.served_model:
            known |= {self._settings.served_model}
        try:
            with self._store.open(batch.input_file_id) as file:
                findings = check_file(
                    file,
                    batch.endpoint,
                    self._settings,
                    known_models=known,
                    tick=lease.check,
                    drafts=drafts,
                    in_two=is_worth(os.fstat(file.fileno()).st_size),
                )
        except FileNotFoundError:
            self._database.transact(lambda connection: self._fail(connection, lease, [FILE_LOST]))
            return
        self._database.transact(lambda connection: self._begin(connection, lease, findings))

    def _begin(self, connection: Connection, lease: BatchLease, findings: Findings) -> None:
        if findings.errors:
            self._fail(connection, lease, findings.errors)
            return
        batch = lease.locked(connection)
        if batch.state != BatchState.VALIDATING:
            return
        load = findings.load
        try:
            open_room(connection, batch.tenant, self._settings).take(load)
        except QuotaExceeded as error:
            self._fail(connection, lease, [line_error(error.code, error.message)])
            return
        connection.execute(
            update(Batch)
            .where(Batch.id == batch.id)
            .values(
                state=BatchState.IN_PROGRESS,
                in_progress_at=now(),
                model=findings.model,
                total=load.jobs,
                next_offset=0,
                reserved_tokens=load.tokens,
                reserved_bytes=load.stored_bytes,
            )
        )
        tallies.add(connection, [load.change(batch.tenant)])

    def _fail(self, connection: Connection, lease: BatchLease, errors: list[dict[str, Any]]) -> None:
        batch = lease.locked(connection)
        if batch.state == BatchState.VALIDATING:
            connection.execute(
                update(Batch)
                .where(Batch.id == batch.id)
                .values(state=BatchState.FAILED, errors=errors, finished_at=now())
            )
