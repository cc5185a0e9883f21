"""What comes at the same time is written together, and everyone gets what is theirs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from jobs.bad_field import BadField
from jobs.body import JobBody
from jobs.database import Database
from jobs.group_commit import GroupCommit
from jobs.intake import Intake
from jobs.models import Job
from jobs.quotas import QuotaExceeded
from jobs.settings import Settings
from jobs.tenants import OPERATOR, Owner, Tenants
from tests.support.waiting import wait_until

COUNT = 20


class Slow:
    """Writes when it is let to, and remembers with whom."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.begun, self.goes = threading.Event(), threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.groups.append(list(items))
        self.begun.set()
        assert self.goes.wait(30)
        return [ValueError(f"{item} is odd") if item % 2 else item * 10 for item in items]


def test_those_who_come_during_a_write_share_the_next() -> None:
    write = Slow()
    commits: GroupCommit[int, int] = GroupCommit(write, most=COUNT - 5)
    with ThreadPoolExecutor(COUNT + 1) as pool:
        first = pool.submit(commits.add, 100)
        assert write.begun.wait(30)
        others = [pool.submit(commits.add, number) for number in range(COUNT)]
        wait_until(lambda: len(commits._queue) == COUNT, "all have come")
        write.goes.set()
        assert first.result(30) == 1000
        for number, other in enumerate(others):
            if number % 2:
                with pytest.raises(ValueError, match=f"^{number} is odd$"):
                    other.result(30)
            else:
                assert other.result(30) == number * 10
    assert [len(group) for group in write.groups] == [1, COUNT - 5, 5]
    assert sorted(item for group in write.groups[1:] for item in group) == list(range(COUNT))


def test_a_write_that_fails_fails_for_all_that_it_had_and_for_nobody_else() -> None:
    def write(items: Sequence[str]) -> list[str | Exception]:
        if "bad" in items:
            raise ConnectionError("gone")
        return list(items)

    commits: GroupCommit[str, str] = GroupCommit(write)
    with pytest.raises(ConnectionError):
        commits.add("bad")
    assert commits.add("good") == "good"


def test_jobs_that_come_together_are_judged_one_by_one(database: Database, settings: Settings) -> None:
    Tenants(database).create("small", quotas={"queued_jobs": 5})
    intake = Intake(database, settings)
    owners = [OPERATOR, Owner("small", None), Owner("nobody", None)]

    def accept(number: int) -> str | Exception:
        try:
            return intake.accept_one(JobBody(prompt=f"job {number}"), owners[number % 3])
        except (BadField, QuotaExceeded) as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(accept, range(36)))
    accepted = [one for one in found if isinstance(one, str)]
    assert all(isinstance(one, str) for one in found[0::3])
    assert [type(one) for one in found[1::3]].count(QuotaExceeded) == 12 - 5
    assert all(isinstance(one, BadField) and one.code == "unknown_tenant" for one in found[2::3])
    with database.read() as connection:
        assert sorted(connection.scalars(select(Job.id))) == sorted(accepted)
