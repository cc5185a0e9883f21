"""Idempotency: one key and one body make one job, however often and from however many sides they come."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select

from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.database import Database
from jobs.idempotency import KeyReusedError, Submit
from jobs.intake import Intake
from jobs.models import Batch, IdempotencyKey, Job
from jobs.quotas import QuotaExceeded
from jobs.settings import Settings
from jobs.tenants import DEFAULT, OPERATOR, Owner, Tenants
from tests.support.invariants import check_tallies

BODY = JobBody(prompt="a", model="tiny")
SUBMIT = Submit.of("night 7", {"prompt": "a"})
OTHER = Owner("other", None)


@pytest.fixture
def intake(database: Database, settings: Settings) -> Intake:
    Tenants(database).create("other")
    return Intake(database, settings)


def count(database: Database, model: type[Job] | type[Batch] | type[IdempotencyKey]) -> int:
    with database.read() as connection:
        check_tallies(connection)
        return connection.scalar(select(func.count()).select_from(model)) or 0


def test_the_same_submit_is_the_same_job(database: Database, intake: Intake) -> None:
    first = intake.accept_one(BODY, OPERATOR, SUBMIT)
    assert intake.accept_one(BODY, OPERATOR, SUBMIT) == first
    assert intake.accept_one(BODY, OPERATOR, Submit.of("another", {"prompt": "a"})) != first
    assert intake.accept_one(BODY, OTHER, SUBMIT) != first  # a key is its tenant's own
    assert intake.accept_one(BODY, OPERATOR) != first
    assert count(database, Job) == 4


def test_the_same_submit_is_the_same_batch(database: Database, intake: Intake) -> None:
    first = intake.accept_many([BODY] * 3, OPERATOR, None, SUBMIT)
    assert intake.accept_many([BODY] * 3, OPERATOR, None, SUBMIT) == first
    assert (count(database, Batch), count(database, Job)) == (1, 3)


def test_a_key_with_another_body_is_refused_and_changes_nothing(database: Database, intake: Intake) -> None:
    intake.accept_one(BODY, OPERATOR, SUBMIT)
    other = Submit.of(SUBMIT.key, {"prompt": "b"})
    with pytest.raises(KeyReusedError):
        intake.accept_one(JobBody(prompt="b", model="tiny"), OPERATOR, other)
    with pytest.raises(KeyReusedError):
        intake.accept_many([BODY], OPERATOR, None, other)
    assert (count(database, Job), count(database, Batch)) == (1, 0)


def test_a_refused_submit_uses_up_no_key(database: Database, intake: Intake) -> None:
    Tenants(database).change(DEFAULT, quotas={"queued_jobs": 0})
    with pytest.raises(QuotaExceeded):
        intake.accept_one(BODY, OPERATOR, SUBMIT)
    assert count(database, IdempotencyKey) == 0
    Tenants(database).change(DEFAULT, quotas={"queued_jobs": None})
    intake.accept_one(BODY, OPERATOR, SUBMIT)
    assert count(database, Job) == 1


def test_copies_that_come_at_once_make_one_batch(database: Database, intake: Intake) -> None:
    together = threading.Barrier(8)

    def submit(_: int) -> str:
        together.wait(30)
        return intake.accept_many([BODY] * 5, OPERATOR, None, SUBMIT)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(submit, range(8)))) == 1
    assert (count(database, Batch), count(database, Job)) == (1, 5)


def test_names_in_another_order_are_the_same_body() -> None:
    first = Submit.of("k", {"prompt": "é\x00", "metadata": {"a": "1", "b": "2"}})
    assert first == Submit.of("k", {"metadata": {"b": "2", "a": "1"}, "prompt": "é\x00"})
    assert first != Submit.of("k", {"prompt": "é", "metadata": {"a": "1", "b": "2"}})


@pytest.mark.parametrize("key", ["", "k" * 256, "é", "a\tb", "\x00"])
def test_keys_that_cannot_be_one(key: str) -> None:
    with pytest.raises(BadField, match="printable ASCII"):
        Submit.of(key, {})
