"""Teller: no sender of a Redis job waits for ever, whoever ended the job.

Owns `told_at`: when Celery's result backend was told of an end. A worker tells of what it wrote itself at once
(`jobs.celery_results`); what was cancelled over HTTP, expired, or ended by a sweep, and what could not be stored
while Redis was away, is found here by every worker's sweep, by a partial index that holds nothing else. Telling
twice is harmless, so nobody locks anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, Row, select, update

from jobs.celery_results import CeleryResults
from jobs.conditions import JOB_FROM_REDIS
from jobs.database import Database
from jobs.dialects import now, portions
from jobs.models import Job, Result
from jobs.outcomes import Outcome, Recorded
from jobs.states import JobState

log = logging.getLogger(__name__)

GRACE_SECONDS: Final = 2.0  # for whoever ended it to tell by itself
JOBS_PER_SWEEP: Final = 200


class Teller:
    def __init__(self, database: Database, results: CeleryResults) -> None:
        self._database = database
        self._results = results

    def sweep(self) -> None:
        """Tell of ends that nobody has told of, unless what was to be told before is still on its way."""
        if not self._results.idle:
            return
        with self._database.read() as connection:
            rows = connection.execute(
                select(
                    Job.id,
                    Job.fence,
                    Job.state,
                    Job.model,
                    Job.error,
                    Result.outputs,
                    Result.prompt_tokens,
                    Result.completion_tokens,
                    Result.cached_tokens,
                )
                .outerjoin(Result, Result.job_id == Job.id)
                .where(
                    JOB_FROM_REDIS,
                    Job.told_at.is_(None),
                    Job.finished_at.is_not(None),
                    Job.finished_at < now() - GRACE_SECONDS,
                )
                .order_by(Job.finished_at, Job.id)
                .limit(JOBS_PER_SWEEP)
            ).all()
        if rows:
            log.info("teller.late jobs=%d", len(rows))
        for row in rows:
            self._results.ended(_recorded(row))

    def told(self, job_ids: Sequence[str]) -> None:
        """Celery's backend has the ends of these jobs."""
        self._database.transact(lambda connection: mark_told(connection, job_ids))


def mark_told(connection: Connection, job_ids: Sequence[str]) -> None:
    """Ids that are no job's, of messages that could not even be stored, are passed over."""
    for some in portions(sorted(job_ids)):
        ids = select(Job.id).where(Job.id.in_(some)).order_by(Job.id).with_for_update()
        held = list(connection.scalars(ids))
        connection.execute(
            update(Job)
            .where(Job.id.in_(held), Job.told_at.is_(None), Job.finished_at.is_not(None))
            .values(told_at=now())
        )


def _recorded(row: Row[tuple[object, ...]]) -> Recorded:
    outcome = Outcome(
        job_id=row.id,
        fence=row.fence,
        kind="completed" if row.state == JobState.COMPLETED else "failed",
        outputs=row.outputs or [],
        error=row.error,
        prompt_tokens=row.prompt_tokens or 0,
        completion_tokens=row.completion_tokens or 0,
        cached_tokens=row.cached_tokens or 0,
    )
    return Recorded(outcome, JobState(row.state), "redis", row.model)
