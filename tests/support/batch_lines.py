"""Lines of OpenAI's batch files for tests, and a batch of them brought as far as a test needs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import select, update

from jobs.batch_intake import BatchIntake
from jobs.claims import claim
from jobs.clerk import Clerk
from jobs.database import Database
from jobs.desk import LeaseLost, take
from jobs.file_batches import FileBatches, parse_wish
from jobs.files import Files
from jobs.leases import new_worker_id, register
from jobs.models import Batch, Job
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.tenants import OPERATOR, Owner

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat_line(number: int, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Write line {number}."}]
    full = {"model": "tiny", "messages": messages, "max_tokens": 8, "seed": number} | body
    return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": full}


def jsonl(lines: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class Bench:
    """The parts of an api process that have to do with files, without HTTP and without threads."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self.announced: list[str] = []
        self.files = Files(database, settings)
        self.batches = FileBatches(database, settings, self.files.store)
        self.clerk = Clerk(database, settings, self.announced.append)

    def upload(self, content: bytes, *, owner: Owner = OPERATOR, seconds: int | None = None) -> str:
        part = self.files.store.begin()
        part.write(content)
        return self.files.keep(part, owner=owner, filename="in.jsonl", seconds=seconds).id

    def create(self, content: bytes | int, *, endpoint: str = CHAT, window: str = "24h", **wish: Any) -> str:
        """A batch in state `validating`; a number: of so many good lines."""
        if isinstance(content, int):
            content = jsonl([chat_line(i) for i in range(content)])
        fields = {"input_file_id": self.upload(content), "endpoint": endpoint, "completion_window": window}
        return self.batches.create(parse_wish(fields | wish), OPERATOR)

    def work(self) -> None:
        """Do all that clerks have to do now."""
        while self.clerk.work_once():
            pass

    def batch(self, batch_id: str) -> Any:
        with self.database.read() as connection:
            return connection.execute(select(*Batch.__table__.columns).where(Batch.id == batch_id)).one()

    def jobs(self, batch_id: str) -> list[Any]:
        query = select(*Job.__table__.columns).where(Job.batch_id == batch_id).order_by(Job.position)
        with self.database.read() as connection:
            return list(connection.execute(query))

    def change(self, batch_id: str, **columns: Any) -> None:
        with self.database.write() as connection:
            connection.execute(update(Batch).where(Batch.id == batch_id).values(**columns))

    def lines(self, file_id: str) -> list[dict[str, Any]]:
        with self.files.store.open(file_id) as file:
            return [json.loads(line) for line in file]


def run(database: Database, limit: int = 1000, *, failing: Sequence[str] = ()) -> int:
    """A worker takes so many jobs and ends them, those with the custom_ids `failing` badly; how many."""
    name = new_worker_id()
    with database.write() as connection:
        register(connection, worker_id=name, model="tiny", lease_seconds=60)
        claims = claim(connection, worker_id=name, model="tiny", limit=limit)
        record(
            connection,
            worker_id=name,
            outcomes=[
                Outcome(
                    job_id=one.job_id,
                    fence=one.fence,
                    kind="failed",
                    error={"code": "invalid_request", "message": "too long", "param": "messages"},
                )
                if one.body.get("custom_id") in failing
                else Outcome(
                    job_id=one.job_id,
                    fence=one.fence,
                    kind="completed",
                    outputs=[{"index": 0, "text": "out", "finish_reason": "stop", "stop_reason": None}],
                    prompt_tokens=3,
                    completion_tokens=5,
                    cached_tokens=2,
                )
                for one in claims
            ],
        )
    return len(claims)


def insert_one_chunk(bench: Bench, batch_id: str) -> None:
    """Validate and insert until one chunk is committed, then lose the lease as a killed process would."""
    lease = take(bench.database, 60)
    assert lease is not None
    bench.batches.validate(lease)
    checks = 0

    def check_once() -> None:
        nonlocal checks
        checks += 1
        if checks > 1:
            raise LeaseLost(batch_id)

    lease.check = check_once  # type: ignore[method-assign]
    with pytest.raises(LeaseLost):
        BatchIntake(bench.database, bench.settings, bench.files.store, lambda model: None).insert(lease)
    bench.change(batch_id, clerk_until=1.0)
