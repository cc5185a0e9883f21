"""What must hold in SQL when all work has ended, whatever died on the way. Every story ends with it.

The names are those of the design: S1 an accepted job is never lost, S2 one terminal state, S3 at most one result,
S4 the billed ledger equals the results, S7 nothing appears after a cancel, S8 tokens depend on the prompt, the
parameters and the seed alone, S9 a batch's counts are those of its jobs. Beside them: the tallies of quotas are what
the rows add up to.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import Connection, select

from jobs.database import Database
from jobs.dialects import now
from jobs.models import Batch, Checkpoint, File, Job, LedgerEntry, Result, Schedule, ScheduleRun, Tenant
from jobs.moments import DAY_SECONDS
from jobs.states import TERMINAL, BatchState, JobState, LedgerKind
from jobs.tallies import used
from jobs.usage import GroupBy, UsageQuery, Usages

ENDS = {BatchState.COMPLETED, BatchState.CANCELLED, BatchState.FAILED, BatchState.EXPIRED}
NOT_TOKENS = {"custom_id", "metadata"}  # fields of a body that do not touch what is generated


def check_invariants(database: Database, accepted: Collection[str]) -> None:
    """`accepted`: ids of all jobs the service ever said yes to."""
    with database.read() as connection:
        jobs = connection.execute(select(*Job.__table__.columns)).mappings().all()
        results = connection.execute(select(*Result.__table__.columns)).mappings().all()
        ledger = connection.execute(select(*LedgerEntry.__table__.columns)).mappings().all()
        _check_batches(connection)
        assert not connection.scalars(select(Checkpoint.job_id)).all(), (
            "a job has ended and its checkpoint has not"
        )
        check_tallies(connection)
        check_runs(connection)
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

    with_reason = {JobState.FAILED, JobState.EXPIRED}
    assert not [job["id"] for job in jobs if (job["error"] is not None) != (job["state"] in with_reason)]
    _check_same_seed_same_text(by_id, results)
    check_usage(database)
    check_places(database)


def check_places(database: Database) -> None:
    """Places of a batch are 1, 2, 3 … without a gap, and only ended jobs have one."""
    with database.read() as connection:
        rows = connection.execute(
            select(Job.batch_id, Job.place, Job.state).where(Job.place.is_not(None))
        ).all()
        batches = connection.execute(select(Batch.id, Batch.num_placed)).all()
    assert all(row.state in TERMINAL for row in rows)
    for batch in batches:
        places = sorted(row.place for row in rows if row.batch_id == batch.id)
        assert places == list(range(1, batch.num_placed + 1)), batch.id


def check_usage(database: Database) -> None:
    """What `/v1/usage` says each tenant was billed is what its results add up to."""
    with database.read() as connection:
        results = connection.execute(
            select(
                Job.tenant,
                Result.prompt_tokens,
                Result.cached_tokens,
                Result.completion_tokens,
            ).join(Job, Job.id == Result.job_id)
        ).all()
    made: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in results:
        made[row.tenant] = [a + b for a, b in zip(made[row.tenant], (1, *row[1:]), strict=True)]
    groups = Usages(database).page(UsageQuery(tenant=None, group_by=(GroupBy.TENANT,), limit=1000)).groups
    told = {group.names[GroupBy.TENANT]: group.tokens[LedgerKind.BILLED] for group in groups}
    for tenant, billed in told.items():
        assert [billed.attempts, billed.prompt, billed.cached, billed.completion] == made[tenant], (
            f"S4: {tenant}"
        )
    assert set(made) <= set(told), "S4"


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


def check_tallies(connection: Connection) -> None:
    """Each tenant's sums, whenever they are looked at, equal its rows. (A day that has just begun is let pass.)"""
    jobs = connection.execute(select(*Job.__table__.columns)).mappings().all()
    results = connection.execute(select(Result.job_id, Result.outputs)).all()
    ledger = connection.execute(select(*LedgerEntry.__table__.columns)).mappings().all()
    files = connection.execute(select(*File.__table__.columns)).mappings().all()
    batches = connection.execute(select(*Batch.__table__.columns)).mappings().all()
    owners = {job["id"]: job["tenant"] for job in jobs}
    midnight = connection.scalars(select(now())).one() // DAY_SECONDS * DAY_SECONDS
    for tenant in connection.scalars(select(Tenant.id)).all():
        mine = [job for job in jobs if job["tenant"] == tenant]
        still_open = [job for job in mine if job["state"] not in TERMINAL]
        use = used(connection, tenant)
        outputs = [row.outputs for row in results if owners[row.job_id] == tenant]
        schedules = connection.scalars(select(Schedule.jobs).where(Schedule.tenant == tenant)).all()
        kept = [*(job["body"] for job in mine), *outputs, *schedules]
        stored = sum(len(json.dumps(value)) for value in kept)
        stored += sum(file["bytes"] for file in files if file["tenant"] == tenant)
        # Lines that are to become jobs have their room already.
        waiting = [
            batch for batch in batches if batch["tenant"] == tenant and batch["next_offset"] is not None
        ]
        stored += sum(batch["reserved_bytes"] for batch in waiting)
        assert use.stored_bytes == stored, tenant
        num_waiting = sum(batch["total"] - batch["num_inserted"] for batch in waiting)
        assert use.queued_jobs == len(still_open) + num_waiting, tenant
        tokens = sum(job["estimated_tokens"] for job in still_open)
        assert use.queued_tokens == tokens + sum(batch["reserved_tokens"] for batch in waiting), tenant
        billed = [row for row in ledger if row["tenant"] == tenant and row["kind"] == LedgerKind.BILLED]
        today = [row for row in billed if row["created_at"] >= midnight]
        if len(today) == len(billed):
            assert use.tokens_per_day == sum(
                row["prompt_tokens"] + row["completion_tokens"] for row in today
            ), tenant


def check_runs(connection: Connection) -> None:
    """Each run has one batch that names its schedule, or a reason; no batch of a schedule is without a run."""
    runs = connection.execute(select(*ScheduleRun.__table__.columns)).mappings().all()
    assert not [run["id"] for run in runs if (run["batch_id"] is None) == (run["error"] is None)]
    query = select(Batch.id, Batch.schedule_id, Batch.tenant).where(Batch.schedule_id.is_not(None))
    batches = sorted(tuple(row) for row in connection.execute(query))
    started = [(run["batch_id"], run["schedule_id"], run["tenant"]) for run in runs if run["batch_id"]]
    assert sorted(started) == batches
    times = [(run["schedule_id"], run["fire_time"]) for run in runs]
    assert len(times) == len(set(times)), "a schedule fired twice for one time"


def _check_batches(connection: Connection) -> None:
    batches = connection.execute(select(*Batch.__table__.columns)).mappings().all()
    rows = connection.execute(select(Job.batch_id, Job.position, Job.state)).all()
    files = set(connection.scalars(select(File.id)))
    for batch in batches:
        of_file = batch["input_file_id"] is not None
        members = [row for row in rows if row.batch_id == batch["id"]]
        assert (batch["num_inserted"] if of_file else batch["total"]) == len(members), f"S9: {batch['id']}"
        assert sorted(row.position for row in members) == list(range(len(members)))
        assert batch["next_offset"] is None, f"{batch['id']} has ended, and lines of it wait to become jobs"
        assert (batch["reserved_tokens"], batch["reserved_bytes"]) == (0, 0), batch["id"]
        assert batch["state"] in ENDS, batch["state"]
        assert batch["finished_at"] is not None
        if batch["state"] == BatchState.COMPLETED:
            assert len(members) == batch["total"]
        # Which lines are in which file is what tests of files look at; that a line lacks a file shows here.
        if of_file and batch["in_progress_at"] is not None:
            completed = sum(row.state == JobState.COMPLETED for row in members)
            assert (batch["output_file_id"] is not None) == (completed > 0), batch["id"]
            assert (batch["error_file_id"] is not None) == (completed < batch["total"]), batch["id"]
        assert not {batch["output_file_id"], batch["error_file_id"]} - files - {None}, batch["id"]
