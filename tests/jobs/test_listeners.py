"""Listeners: many requests hear of their jobs through one reader; without Redis, through SQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.asyncio import Redis

from jobs import listeners as module
from jobs.audience import Piece, end_entry, pieces_entry, stream_name
from jobs.body import parse_job
from jobs.cancels import Cancels
from jobs.database import Database
from jobs.intake import Intake
from jobs.listeners import Listener, Listeners
from jobs.reads import Reads
from jobs.settings import Settings
from jobs.tenants import DEFAULT, OPERATOR
from tests.support.databases import Databases

LONG = 30.0  # seconds that nothing here should take


@pytest.fixture(scope="module")
def database(databases: Databases) -> Any:
    with databases.fresh("sqlite") as url:
        database = Database(url)
        yield database
        database.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is heard is heard because it was said, not because somebody looked once more."""
    for name in ("LOOK_SECONDS", "BLOCK_SECONDS", "SOCKET_SECONDS"):
        monkeypatch.setattr(module, name, 3600.0)


@asynccontextmanager
async def listening(url: str, database: Database) -> AsyncIterator[Listeners]:
    listeners = Listeners(url, Reads(database))
    try:
        yield listeners
    finally:
        await listeners.close()


async def hear(listener: Listener) -> list[Piece]:
    """All that comes until the end."""
    pieces: list[Piece] = []
    while True:
        pieces += await listener.next(LONG)
        assert pieces or listener.ended, "nothing was heard"
        if listener.ended:
            return pieces


def run(redis_url: str, database: Database, work: Callable[[Listeners, Redis], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with Redis.from_url(redis_url) as speaker, listening(redis_url, database) as listeners:
            await work(listeners, speaker)

    asyncio.run(all_of_it())


async def say(speaker: Redis, job_id: str, *pieces: Piece, end: bool = False) -> None:
    if pieces:
        await speaker.xadd(stream_name(job_id), pieces_entry(pieces))
    if end:
        await speaker.xadd(stream_name(job_id), end_entry())
    await speaker.expire(stream_name(job_id), 60)


def test_many_listeners_hear_each_their_own(redis_url: str, database: Database) -> None:
    names = [f"job_{i}" for i in range(100)]

    async def work(listeners: Listeners, speaker: Redis) -> None:
        async def one(name: str) -> None:
            with listeners.listen(name) as listener:
                assert await hear(listener) == [Piece(0, 0, name), Piece(0, len(name), "!")]

        ears = [asyncio.ensure_future(one(name)) for name in names]
        await asyncio.sleep(0)
        for name in names:
            await say(speaker, name, Piece(0, 0, name))
        for name in reversed(names):
            await say(speaker, name, Piece(0, len(name), "!"), end=True)
        await asyncio.gather(*ears)

    run(redis_url, database, work)


def test_who_comes_late_hears_it_from_the_start(redis_url: str, database: Database) -> None:
    first, second = Piece(0, 0, "a"), Piece(0, 1, "b")

    async def work(listeners: Listeners, speaker: Redis) -> None:
        await say(speaker, "job_1", first)
        with listeners.listen("job_1") as early:
            assert await early.next(LONG) == [first]
            with listeners.listen("job_1") as late:
                assert await late.next(LONG) == [first]
                await say(speaker, "job_1", second, end=True)
                assert await hear(late) == [second]
                # The early one may hear things twice, each with its place.
                assert {*await hear(early)} <= {first, second}
                assert early.ended
        with listeners.listen("job_2") as other:
            await say(speaker, "job_2", first, end=True)
            assert await hear(other) == [first]

    run(redis_url, database, work)


def test_a_memory_that_redis_lost(
    redis_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)

    async def work(listeners: Listeners, speaker: Redis) -> None:
        with listeners.listen("job_1") as listener:
            await say(speaker, "job_1", Piece(0, 0, "a"))
            assert await listener.next(LONG) == [Piece(0, 0, "a")]
            await speaker.flushall()
            await speaker.client_kill_filter(_type="normal", skipme=True)
            await say(speaker, "job_1", Piece(0, 5, "f"), end=True)
            assert await hear(listener) == [Piece(0, 5, "f")]

    run(redis_url, database, work)


def test_without_redis_the_end_is_found_in_sql(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    settings = Settings(data_dir=tmp_path, model="tiny")
    intake = Intake(database, settings)
    ended, open_ = [intake.accept_one(parse_job({"prompt": "x"}, settings), OPERATOR) for _ in range(2)]
    Cancels(database).cancel_job(ended, tenant=DEFAULT)

    async def work() -> None:
        async with listening(settings.redis, database) as listeners:
            with listeners.listen(open_) as waiting, listeners.listen(ended) as listener:
                assert await hear(listener) == []
                assert await waiting.next(0.05) == []
                assert not waiting.ended

    asyncio.run(work())


def test_nothing_stays_in_redis(redis_url: str, database: Database) -> None:
    async def work(listeners: Listeners, speaker: Redis) -> None:
        with listeners.listen("job_1") as listener:
            await say(speaker, "job_1", end=True)
            await hear(listener)
        assert not listeners._listening
        assert not listeners._last

    run(redis_url, database, work)
    with redis.Redis.from_url(redis_url) as client:
        assert all(client.ttl(key) > 0 for key in client.keys("nightpress:*"))
