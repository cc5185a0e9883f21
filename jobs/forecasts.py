"""Forecasts: when a job or a batch will be done, and whether a window that a submit asks for can be met.

Owns the arithmetic. The work ahead of a job is what workers hold (half of what already runs is taken as done) and
what is queued up to its fair tag, in estimated tokens; what models make of estimates lately (`jobs.pace`) turns
these into tokens that will be computed, and the live workers' speeds into seconds. No job is done sooner than one of
its samples, which gets a token per step. Not heeded: later jobs that will be put ahead, a mix of jobs that differs
from the recent one, and, of a batch for several models, those that only jobs before the last `LAST_JOBS` need. What
nobody has measured is None, and nobody is refused for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, func, select

from jobs.batch_reads import BatchView
from jobs.conditions import JOB_HAS_DEADLINE, JOB_QUEUED, JOB_UNFINISHED
from jobs.counted_tokens import counted, counted_column
from jobs.database import Database
from jobs.job_rows import JobRow
from jobs.models import Job
from jobs.queue_depth import Picture, Queue, QueueDepth
from jobs.reads import JobView
from jobs.settings import Settings
from jobs.states import BatchState, JobState
from jobs.terms import DELAYED, Terms, Tier

LAST_JOBS: Final = 1000  # of a batch, whose places say when it ends


class WindowTooTight(Exception):
    """`retry_after`: seconds after which the same window could be met; None: not even with an empty queue."""

    code = "window_cannot_be_met"
    param = "completion_window"

    def __init__(self, *, model: str, seconds: float, window: float, retry_after: float | None) -> None:
        self.retry_after = retry_after
        self.message = (
            f"the window of {_spoken(window)} cannot be met: at the measured speed of the workers that serve "
            f"{model} this would be done in about {_spoken(seconds)}; ask for a longer one, or for none"
        )
        super().__init__(self.message)

    def as_error(self) -> dict[str, str | None]:
        """As `models.ScheduleRun.error` stores it."""
        return {"code": self.code, "message": self.message, "param": self.param}


@dataclass(frozen=True, slots=True)
class Speed:
    """Of all live workers of a model, in estimated tokens per second: `together`, and of one sequence `alone`."""

    together: float
    alone: float


class Outlook(NamedTuple):
    """`end`: when it will be done, in unix seconds; None when nothing is known. `unserved`: models that it waits for
    and no live worker serves; None when it is not open."""

    end: float | None = None
    unserved: tuple[str, ...] | None = None


class Forecasts:
    """One per process. Times are unix seconds on the database's clock."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._depth = QueueDepth(database)
        self._slack = settings.promise_slack
        self._refuses = settings.promise_refuse

    def accepted(self, rows: Sequence[JobRow]) -> None:
        """These jobs have just been queued here."""
        for model, tokens in _added(rows, self._depth.contexts).items():
            self._depth.changed(model, tokens)

    def of_job(self, job: JobView) -> Outlook:
        """Nothing of one that is not open, or is being cancelled."""
        if job.state not in (JobState.QUEUED, JobState.IN_PROGRESS):
            return Outlook()
        place = (job.tier, job.fair_tag) if job.state is JobState.QUEUED else None
        started_at = job.started_at if place is None else job.not_before
        picture = self._depth.picture()
        longest = job.estimated_tokens // job.num_samples
        end = _end_of(picture, job.model, place, longest_tokens=longest, started_at=started_at)
        return Outlook(end, _unserved(picture, {job.model}))

    def of_batch(self, batch: BatchView) -> Outlook:
        """Of the last of its jobs, as for a job."""
        if batch.state is not BatchState.IN_PROGRESS:
            return Outlook()
        tier = (Job.tier % DELAYED).label("tier")
        of_sample = (Job.estimated_tokens // Job.num_samples).label("of_sample")
        columns = (Job.model, tier, Job.fair_tag, of_sample, Job.not_before, Job.started_at)
        open_jobs = select(*columns).where(Job.batch_id == batch.id)
        last = open_jobs.where(Job.state == JobState.QUEUED).order_by(Job.position.desc()).limit(LAST_JOBS)
        with self._database.read() as connection:
            found = _places(connection, last.subquery(), queued=True)
            if not found:
                held = open_jobs.where(Job.state == JobState.IN_PROGRESS).limit(LAST_JOBS)
                found = _places(connection, held.subquery(), queued=False)
        picture = self._depth.picture()
        ends = [
            _end_of(picture, model, place, longest_tokens=longest, started_at=started_at)
            for model, place, longest, started_at in found
        ]
        known = [end for end in ends if end is not None]
        end = max(known) if known and len(known) == len(ends) else None
        return Outlook(end, _unserved(picture, {model for model, *_ in found}))

    def prepare(self, terms: Terms) -> None:
        """Call it before a transaction that will `check`, so that it need not look at the queue itself."""
        if terms.deadline is not None and self._refuses:
            self._depth.picture()

    def check(self, connection: Connection, rows: Sequence[JobRow], terms: Terms) -> None:
        """Whether these jobs, which are queued now, in the transaction of `connection`, can be done in time. Raises
        `WindowTooTight`, only on evidence."""
        if terms.deadline is None or not self._refuses:
            return
        for model, tokens in sorted(_added(rows, self._depth.picture(connection).contexts).items()):
            self._check(connection, model, tokens, terms.deadline)

    def _check(self, connection: Connection, model: str, added_tokens: int, deadline: float) -> None:
        picture = self._depth.picture(connection)
        queue = picture.queues.get(model)
        speed = None if queue is None else _speed(queue)
        if queue is None or speed is None:
            return
        window = deadline - picture.at
        own = added_tokens / speed.together * self._slack
        seconds = own + (_held(queue) + queue.ahead(Tier.NORMAL)) / speed.together * self._slack
        if seconds > window:
            # Behind all that waits it would be late. But before that it becomes urgent, and then only those that wait
            # for an answer or are due sooner go first.
            ahead = queue.ahead(Tier.URGENT) + _due_sooner(connection, picture, model, deadline)
            seconds = own + (_held(queue) + ahead) / speed.together * self._slack
        if seconds > window:
            retry_after = None if own > window else max(seconds - window, 1.0)
            raise WindowTooTight(model=model, seconds=seconds, window=window, retry_after=retry_after)


def _added(rows: Iterable[JobRow], contexts: Mapping[str, int]) -> Counter[str]:
    """Tokens by model, as they count in the queue."""
    tokens: Counter[str] = Counter()
    for row in rows:
        context = contexts.get(row["model"])
        tokens[row["model"]] += counted(row["estimated_tokens"], row["num_samples"], context)
    return tokens


def _due_sooner(connection: Connection, picture: Picture, model: str, deadline: float) -> int:
    """Estimated tokens of the normal jobs that wait and whose deadline comes first."""
    query = select(func.coalesce(func.sum(counted_column(picture.contexts)), 0)).where(
        JOB_HAS_DEADLINE,
        JOB_UNFINISHED,
        JOB_QUEUED,
        Job.tier == Tier.NORMAL,
        Job.model == model,
        Job.deadline <= deadline,
    )
    return int(connection.scalar(query) or 0)


Place = tuple[int, float]  # tier, fair tag


def _places(
    connection: Connection, jobs: Any, *, queued: bool
) -> list[tuple[str, Place | None, int, float | None]]:
    """By model: the last place, the most tokens of one sample, and when that can have begun."""
    columns = jobs.c
    begun = func.max(columns.not_before if queued else columns.started_at)
    rows = connection.execute(
        select(
            columns.model, columns.tier, func.max(columns.fair_tag), func.max(columns.of_sample), begun
        ).group_by(columns.model, columns.tier)
    )
    return [
        (model, (tier, fair_tag) if queued else None, longest, started_at)
        for model, tier, fair_tag, longest, started_at in rows
    ]


def _unserved(picture: Picture, models: Iterable[str]) -> tuple[str, ...]:
    served = {model for model, queue in picture.queues.items() if queue.workers}
    return tuple(sorted(set(models) - served))


def _end_of(
    picture: Picture, model: str, place: Place | None, *, longest_tokens: int, started_at: float | None
) -> float | None:
    queue = picture.queues.get(model)
    speed = None if queue is None else _speed(queue)
    if queue is None or speed is None:
        return None
    longest_tokens = counted(longest_tokens, 1, picture.contexts.get(model))
    ahead = _held(queue) + (0 if place is None else queue.ahead(*place))
    earliest = (
        picture.at if started_at is None else started_at if place is None else max(started_at, picture.at)
    )
    return max(picture.at + ahead / speed.together, earliest + longest_tokens / speed.alone)


def _speed(queue: Queue) -> Speed | None:
    """A worker that has measured nothing yet counts like the mean of the others."""
    known = [one for one in queue.workers if one.tokens_per_second and one.steps_per_second]
    computed = sum(one.computed_tokens for one in known)
    estimated = sum(one.estimated_tokens for one in known)
    if not known or not computed or not estimated:
        return None
    per_token = estimated / computed
    together = _mean(one.tokens_per_second or 0.0 for one in known) * len(queue.workers)
    return Speed(together * per_token, _mean(one.steps_per_second or 0.0 for one in known) * per_token)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _held(queue: Queue) -> float:
    """Estimated tokens that held jobs still need."""
    if not queue.num_held:
        return 0.0
    return queue.held_tokens * (1 - min(queue.num_running / queue.num_held, 1.0) / 2)


def _spoken(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
