"""What must hold in SQL when all work has ended, whatever died on the way. Every story ends with it.

The names are those of the design: S1 an accepted job is never lost, S2 one terminal state, S3 at most one result,
S4 the billed ledger equals the results, S7 nothing appears after a cancel, S8 tokens depend on the prompt, the
parameters and the seed alone, S9 a batch's counts are those of its jobs.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import Connection, select

from jobs.database import Database
from jobs.models import Batch, Job, LedgerEntry, Result
from jobs.states import TERMINAL, BatchState, JobState, LedgerKind

NOT_TOKENS = {"custom_id", "metadata"}  # fields of a body that do not touch what is generated


def check_invariants(database: Database, accepted: Collection[str]) -> Counter[str]:
    """`accepted`: ids of all jobs the service ever said yes to. Returns the number of jobs in each state."""
    with database.read() as connection:
        jobs = connection.execute(select(*Job.__table__.columns)).mappings().all()
        results = connection.execute(select(*Result.__table__.columns)).mappings().all()
        ledger = connection.execute(select(*LedgerEntry.__table__.columns)).mappings().all()
        _check_batches(connection)
    by_id = {job["id"]: job for job in jobs}

    assert not set(accepted) - set(by_id), "S1: accepted jobs are gone"
    open_jobs = {job["id"]: job["state"] for job in jobs if job["state"] not in TERMINAL}
    assert not open_jobs, f"S1: jobs have not ended: {open_jobs}"
    assert not [job["id"] for job in jobs if job["worker_id"] or job["finished_at"] is None], "S2"

    completed = {job["id"] for job in jobs if job["state"] == JobState.COMPLETED}
    assert len(results) == len({row["job_id"] for row in results}), "S3: two results of one job"
    assert {row["job_id"] for row in results} == completed, "S3, S7: one result if and only if completed"
    _check_outputs(by_id, results)

    billed = [row for row in ledger if row["kind"] == LedgerKind.BILLED]
    assert len(billed) == len(results), "S4: one billed row per result"
    assert {_tokens(row) for row in billed} == {_tokens(row) for row in results}, "S4"
    fences = {row["job_id"]: row["fence"] for row in billed}
    assert all(by_id[job_id]["fence"] == fence for job_id, fence in fences.items()), "billed by a stale fence"
    assert all(row["fence"] <= by_id[row["job_id"]]["fence"] for row in ledger)

    assert not [job["id"] for job in jobs if (job["error"] is not None) != (job["state"] == JobState.FAILED)]
    _check_same_seed_same_text(by_id, results)
    return Counter(job["state"] for job in jobs)


def _tokens(row: Any) -> tuple[Any, ...]:
    return row["job_id"], row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]


def _check_outputs(by_id: dict[str, Any], results: Iterable[Any]) -> None:
    for row in results:
        body = by_id[row["job_id"]]["body"]
        num_samples = body.get("n") or 1
        assert [output["index"] for output in row["outputs"]] == list(range(num_samples))
        assert all(isinstance(output["text"], str) for output in row["outputs"])
        assert {output["finish_reason"] for output in row["outputs"]} <= {"stop", "length"}
        assert row["prompt_tokens"] > 0
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        if limit is not None:
            assert 0 < row["completion_tokens"] <= limit * num_samples
            if body.get("ignore_eos") and not body.get("stop"):
                assert row["completion_tokens"] == limit * num_samples


def _check_same_seed_same_text(by_id: dict[str, Any], results: Iterable[Any]) -> None:
    texts: dict[str, set[str]] = defaultdict(set)
    for row in results:
        job = by_id[row["job_id"]]
        body = {key: value for key, value in job["body"].items() if key not in NOT_TOKENS}
        key = json.dumps([job["model"], job["seed"], body], sort_keys=True)
        texts[key].add(json.dumps([output["text"] for output in row["outputs"]]))
    assert not [key for key, found in texts.items() if len(found) > 1], "S8: one seed, several texts"


def _check_batches(connection: Connection) -> None:
    batches = connection.execute(select(*Batch.__table__.columns)).mappings().all()
    rows = connection.execute(select(Job.batch_id, Job.position, Job.state)).all()
    for batch in batches:
        members = [row for row in rows if row.batch_id == batch["id"]]
        assert batch["total"] == len(members), f"S9: {batch['id']}"
        assert sorted(row.position for row in members) == list(range(len(members)))
        assert batch["state"] in (BatchState.COMPLETED, BatchState.CANCELLED), batch["state"]
        assert batch["finished_at"] is not None
