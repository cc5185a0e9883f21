"""Listeners: the requests of this process that wait for their jobs, and how they hear of them.

Owns three tasks. One reads the Redis Streams of all awaited jobs in one blocking call, and a stream of its own by
which the second wakes it when another job is to be heard. The third asks SQL once a second which of the jobs have
ended, so that a Redis that is away, or has lost its memory, costs time and nothing else. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from jobs.audience import LIFE_SECONDS, Piece, heard, stream_name
from jobs.reads import Reads

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
BLOCK_SECONDS = 5.0
SOCKET_SECONDS = 10.0  # longer than a blocking read
RETRY_SECONDS = 0.5
ENTRIES = 100  # of one stream at a time
START = "0-0"


class Listener:
    """What one request has heard of its job and not taken yet."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.ended = False  # it is in SQL that the job has ended
        self._pieces: list[Piece] = []
        self._news = asyncio.Event()

    def hear(self, pieces: Iterable[Piece], ended: bool) -> None:
        self._pieces += pieces
        self.ended = self.ended or ended
        if self._pieces or self.ended:
            self._news.set()

    def rouse(self) -> None:
        """Whoever waits for news waits no longer."""
        self._news.set()

    async def next(self, timeout: float) -> list[Piece]:
        """Pieces that have come, or none if the job has ended, `timeout` seconds have passed or it was roused."""
        try:
            async with asyncio.timeout(timeout):
                await self._news.wait()
        except TimeoutError:
            return []
        if not self.ended:
            self._news.clear()
        pieces, self._pieces = self._pieces, []
        return pieces


class Listeners:
    """Used from one event loop only. Connects and starts with the first listener."""

    def __init__(self, redis_url: str, reads: Reads) -> None:
        self._redis_url = redis_url
        self._reads = reads
        self._redis: Redis | None = None
        self._listening: dict[str, set[Listener]] = {}
        self._last: dict[str, str] = {}  # by job id: the entry that was read last
        self._bell = stream_name("listeners-" + secrets.token_hex(8))
        self._last_ring = START
        self._some = asyncio.Event()  # somebody listens
        self._new = asyncio.Event()  # to a job that the reader may not know of
        self._tasks: list[asyncio.Task[None]] = []

    @contextmanager
    def listen(self, job_id: str) -> Iterator[Listener]:
        """Hear of a job, from its first word on, also if it was said before."""
        listener = Listener(job_id)
        self._listening.setdefault(job_id, set()).add(listener)
        # Others who listen to the same job hear it again, and know it by its place.
        self._last[job_id] = START
        self._start()
        self._some.set()
        self._new.set()
        try:
            yield listener
        finally:
            listeners = self._listening[job_id]
            listeners.discard(listener)
            if not listeners:
                del self._listening[job_id], self._last[job_id]
            if not self._listening:
                self._some.clear()

    async def close(self) -> None:
        waiting = set(self._tasks)
        while waiting:  # again, because a cancel that meets an answer of Redis may get lost in its client
            for task in waiting:
                task.cancel()
            _, waiting = await asyncio.wait(waiting, timeout=0.1)
        if self._redis is not None:
            await self._redis.aclose()

    def _start(self) -> None:
        if self._redis is None:
            self._redis = Redis.from_url(
                self._redis_url, socket_timeout=SOCKET_SECONDS, socket_connect_timeout=SOCKET_SECONDS
            )
            for work in (self._read(), self._ring(), self._look()):
                task = asyncio.get_running_loop().create_task(work)
                self._tasks.append(task)

    # --- Redis ------------------------------------------------------------------------------------------------

    async def _ring(self) -> None:
        assert self._redis is not None
        while True:
            await self._new.wait()
            self._new.clear()
            try:
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.xadd(self._bell, {"ring": ""}, maxlen=1)
                    pipe.expire(self._bell, LIFE_SECONDS)
                    await pipe.execute()
            except (RedisError, OSError):
                pass  # the reader says so, and tries again with all names

    async def _read(self) -> None:
        failing = False
        while True:
            await self._some.wait()
            try:
                asked = dict(self._last)
                self._take(await self._entries_behind(asked), asked)
                failing = False
            except (RedisError, OSError) as error:
                if not failing:  # said once, not until Redis is back
                    log.warning("listeners.redis error=%s", type(error).__name__)
                failing = True
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                log.exception("listeners.failed")
                await asyncio.sleep(RETRY_SECONDS)

    async def _entries_behind(self, asked: dict[str, str]) -> Any:
        assert self._redis is not None
        places: dict[Any, Any] = {stream_name(job_id): last for job_id, last in asked.items()}
        places[self._bell] = self._last_ring
        return await self._redis.xread(places, count=ENTRIES, block=int(BLOCK_SECONDS * 1000))

    def _take(self, answer: Any, asked: dict[str, str]) -> None:
        # A list of pairs in RESP2; in RESP3 a map, whose values are lists of lists of entries in some clients.
        found = answer.items() if isinstance(answer, dict) else answer or ()
        by_name = {stream_name(job_id).encode(): job_id for job_id in asked}
        for name, entries in found:
            while entries and isinstance(entries[0], list):
                entries = entries[0]
            job_id = by_name.get(name)
            last = entries[-1][0].decode()
            if job_id is None:
                self._last_ring = last
                continue
            # Else somebody has come meanwhile, who wants it from the start.
            if self._last.get(job_id) == asked[job_id]:
                self._last[job_id] = last
            for said in [heard(entry) for _, entry in entries]:
                for listener in self._listening.get(job_id, ()):
                    listener.hear(said.pieces, said.ended)

    # --- SQL --------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(LOOK_SECONDS)
            waiting = [
                job_id
                for job_id, listeners in self._listening.items()
                if not all(listener.ended for listener in listeners)
            ]
            try:
                ended = await asyncio.to_thread(self._reads.ended, waiting) if waiting else set()
            except SQLAlchemyError as error:
                log.warning("listeners.database error=%s", type(error).__name__)
                continue
            for job_id in ended:
                for listener in self._listening.get(job_id, ()):
                    listener.hear((), ended=True)
