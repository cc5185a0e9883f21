"""Checkpoints: whatever parts are there, a job goes on from an unbroken beginning of what it made."""

from __future__ import annotations

from functools import partial

from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import func, select, update

from engine.growth import Growth, join, size_of
from engine.request import Generated, RequestId, TokenLogprobs
from jobs.body import JobBody
from jobs.cancels import Cancels
from jobs.checkpoints import forget, load, save
from jobs.claims import Claim, claim
from jobs.database import Database
from jobs.deadlines import make_due
from jobs.dialects import now
from jobs.intake import Intake
from jobs.models import Checkpoint, Job
from jobs.outcomes import Outcome, record
from jobs.settings import Settings
from jobs.states import JobState
from jobs.sweeper import take_back
from jobs.tenants import OPERATOR
from jobs.terms import Retry, Terms
from tests.support import rows

WEIGHTS = "a" * 64


def growth(job_id: str, *parts: tuple[int, tuple[int, ...]], fence: int = 1) -> Growth:
    return Growth(
        id=RequestId(job_id, fence),
        starts=tuple(start for start, _ in parts),
        generated=tuple(Generated(token_ids=tokens) for _, tokens in parts),
    )


def take(database: Database, worker: str = "w", weights: str = WEIGHTS) -> list[Claim]:
    return database.transact(partial(claim, worker_id=worker, model="tiny", limit=10, weights=weights))


def keep(database: Database, *growths: Growth, worker: str = "w") -> set[RequestId]:
    return database.transact(partial(save, worker_id=worker, weights=WEIGHTS, growths=growths))


def end(database: Database, *outcomes: Outcome, worker: str = "w") -> list[JobState | None]:
    recorded = database.transact(partial(record, worker_id=worker, outcomes=outcomes, weights=WEIGHTS))
    return [item.state for item in recorded]


def num_parts(database: Database) -> int:
    with database.read() as connection:
        return connection.scalar(select(func.count()).select_from(Checkpoint)) or 0


def made(*samples: tuple[int, ...]) -> tuple[Generated, ...]:
    return tuple(Generated(token_ids=sample) for sample in samples)


@given(
    samples=st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=3),
    cuts=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), max_size=5),
    lost=st.integers(0, 5),
    repeated=st.booleans(),
)
@example(samples=[[5, 6, 7]], cuts=[[2, 2, 2], [1, 1, 1]], lost=1, repeated=False)  # a token each
def test_parts_make_a_beginning(
    samples: list[list[int]], cuts: list[list[int]], lost: int, repeated: bool
) -> None:
    ends = [tuple(len(sample) for sample in samples)]
    for cut in cuts:  # from behind: each end lies before the next one
        ends.insert(0, tuple(min(c, e) for c, e in zip(cut, ends[0], strict=False)))
    logprobs = [
        [TokenLogprobs(token_id=t, logprob=-float(i)) for i, t in enumerate(sample)] for sample in samples
    ]
    parts: list[Growth] = []
    starts = (0,) * len(samples)
    for upto in ends:
        generated = tuple(
            Generated(token_ids=tuple(sample[a:b]), logprobs=tuple(probs[a:b]))
            for sample, probs, a, b in zip(samples, logprobs, starts, upto, strict=True)
        )
        parts.append(Growth(id=RequestId("a", 1), starts=starts, generated=generated))
        starts = upto
    if repeated:
        parts.insert(len(parts) // 2, parts[len(parts) // 2])
    whole = join(parts)
    assert [list(sample.token_ids) for sample in whole] == samples
    assert [list(sample.logprobs) for sample in whole] == logprobs
    some = join([part for number, part in enumerate(parts) if number != lost])
    for sample, beginning in zip(samples, some, strict=False):
        assert list(beginning.token_ids) == sample[: len(beginning.token_ids)]


def test_nothing_joined_is_nothing() -> None:
    assert join([]) == ()
    assert size_of(join([growth("a", (3, (1,)))])) == 0


def test_the_next_claim_goes_on_from_what_was_saved(database: Database, submit) -> None:
    (job_id,) = submit(1)
    (first,) = take(database)
    assert first.generated == ()
    assert keep(database, growth(job_id, (0, (1, 2)), (0, (9,)))) == {RequestId(job_id, 1)}
    assert keep(database, growth(job_id, (2, (3,)), (1, ()))) == {RequestId(job_id, 1)}
    assert end(database, Outcome(job_id=job_id, fence=1, kind="released")) == [JobState.QUEUED]
    (second,) = take(database)
    assert second.generated == made((1, 2, 3), (9,))
    keep(database, growth(job_id, (3, (4,)), (1, (8, 7)), fence=2))
    assert end(database, Outcome(job_id=job_id, fence=2, kind="released")) == [JobState.QUEUED]
    (third,) = take(database)
    assert third.generated == made((1, 2, 3, 4), (9, 8, 7))
    assert end(database, Outcome(job_id=job_id, fence=3, kind="completed", outputs=[{"text": "x"}])) == [
        JobState.COMPLETED
    ]
    assert num_parts(database) == 0


def test_tokens_of_other_weights_are_passed_over(database: Database, submit) -> None:
    (job_id,) = submit(1)
    take(database)
    keep(database, growth(job_id, (0, (1, 2))))
    end(database, Outcome(job_id=job_id, fence=1, kind="released"))
    (exchanged,) = take(database, weights="b" * 64)
    assert exchanged.generated == ()


def test_a_stale_worker_saves_nothing(database: Database, submit) -> None:
    (job_id,) = submit(1)
    take(database, worker="dead")
    end(database, Outcome(job_id=job_id, fence=1, kind="released"), worker="dead")
    assert keep(database, growth(job_id, (0, (1,))), worker="dead") == set()
    take(database)
    assert keep(database, growth(job_id, (0, (1,))), worker="dead") == set()
    assert keep(database, growth(job_id, (0, (1,)), fence=1)) == set()
    assert num_parts(database) == 0


def test_a_job_that_is_handed_back_brings_all_it_has_made(database: Database, submit) -> None:
    """One part takes the place of all before it, and its tokens are not booked as wasted."""
    (job_id,) = submit(1)
    take(database)
    keep(database, growth(job_id, (0, (1, 2))))
    keep(database, growth(job_id, (2, (3,))))
    back = Outcome(
        job_id=job_id,
        fence=1,
        kind="released",
        prompt_tokens=5,
        completion_tokens=4,
        kept_tokens=4,
        generated=made((1, 2, 3, 4)),
    )
    assert end(database, back) == [JobState.QUEUED]
    assert num_parts(database) == 1
    assert rows.ledger(database) == [(job_id, 1, "wasted", 5, 0)]
    (again,) = take(database)
    assert again.generated == made((1, 2, 3, 4))
    assert end(database, Outcome(job_id=job_id, fence=2, kind="released", generated=())) == [JobState.QUEUED]
    (anew,) = take(database)
    assert anew.generated == ()


def test_a_cancelled_job_is_booked_whole_and_keeps_nothing(database: Database, submit) -> None:
    running, waiting = submit(2)
    take(database)
    keep(database, growth(running, (0, (1, 2))), growth(waiting, (0, (3,))))
    end(database, Outcome(job_id=waiting, fence=1, kind="released"))
    cancels = Cancels(database)
    assert cancels.cancel_job(waiting, tenant="default") is JobState.CANCELLED
    assert cancels.cancel_job(running, tenant="default") is JobState.CANCELLING
    back = Outcome(
        job_id=running,
        fence=1,
        kind="released",
        prompt_tokens=5,
        completion_tokens=3,
        kept_tokens=3,
        generated=made((1, 2, 3)),
    )
    assert end(database, back) == [JobState.CANCELLED]
    assert rows.ledger(database) == [(running, 1, "cancelled", 5, 3)]
    assert num_parts(database) == 0


def test_what_a_dead_worker_saved_stays_and_of_cancelled_jobs_goes(database: Database, submit) -> None:
    lives, dies = submit(2)
    take(database, worker="never registered")
    keep(database, growth(lives, (0, (1, 2))), growth(dies, (0, (3,))), worker="never registered")
    Cancels(database).cancel_job(dies, tenant="default")
    assert database.transact(take_back) == (1, 1)
    (again,) = take(database)
    assert (again.job_id, again.generated) == (lives, made((1, 2)))
    assert num_parts(database) == 1


def test_forget_of_nothing(database: Database) -> None:
    database.transact(lambda connection: forget(connection, []))
    with database.read() as connection:
        assert load(connection, [], WEIGHTS) == {}


def test_a_job_that_starts_over_leaves_its_checkpoint_behind(database: Database, settings: Settings) -> None:
    terms = Terms(retry=Retry(max_attempts=2))
    job_id = Intake(database, settings).accept_one(JobBody(prompt="x"), OPERATOR, terms=terms)
    take(database)
    keep(database, growth(job_id, (0, (1, 2))))
    error = {"code": "numerics", "message": "not finite"}
    failed = Outcome(job_id=job_id, fence=1, kind="failed", error=error)
    assert end(database, failed) == [JobState.QUEUED]
    assert num_parts(database) == 0
    database.transact(lambda c: c.execute(update(Job).values(not_before=now() - 1)))
    assert database.transact(make_due) == 1
    (again,) = take(database)
    assert (again.fence, again.generated) == (2, ())
