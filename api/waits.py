"""Waits: one request's wait for its job, from the commit of the job to its end, or to the client's.

Owns the rule of who is waited for how long: a job whose client has left, or whose time is up, is cancelled, unless
the client has said that it comes back for the answer. Knows no objects of OpenAI's; what it says of text is where it
goes on (`Transcript`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from api.errors import ApiError
from jobs.audience import Piece
from jobs.cancels import Cancels
from jobs.failures import failure_of
from jobs.listeners import Listener, Listeners
from jobs.reads import JobView, Reads
from jobs.states import TERMINAL

log = logging.getLogger(__name__)
T = TypeVar("T")

FINAL = {"x-should-retry": "false"}  # the same request would fare the same


class DivergedError(Exception):
    """What was sent is not how the result begins: the job was begun again and went another way."""


class Transcript:
    """What a client has been sent of each sample: of its text, and of its reasoning."""

    def __init__(self, num_samples: int) -> None:
        self._sent = {
            (sample, is_reasoning): _Sent() for sample in range(num_samples) for is_reasoning in (False, True)
        }

    def take(self, piece: Piece) -> str:
        """What of `piece` is to be sent: nothing that was sent before, and nothing behind a gap."""
        sent = self._sent.get((piece.sample, piece.is_reasoning))
        overlap = sent.num_chars - piece.at if sent else -1
        return sent.note(piece.text[overlap:]) if sent and overlap >= 0 else ""

    def rest(self, sample: int, whole: str, *, is_reasoning: bool = False) -> str:
        """What is still to be sent when the whole text is known. Raises `DivergedError`."""
        sent = self._sent[sample, is_reasoning]
        if not whole.startswith("".join(sent.parts)):
            raise DivergedError
        return sent.note(whole[sent.num_chars :])


class _Sent:
    """What has been sent of one text."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.num_chars = 0

    def note(self, text: str) -> str:
        if text:
            self.parts.append(text)
            self.num_chars += len(text)
        return text


class Wait:
    """Close it, whatever happens. `keep`: the job goes on without us."""

    def __init__(self, waits: Waits, job_id: str, tenant: str, *, keep: bool) -> None:
        self.job_id = job_id
        self.keep = keep
        self._waits = waits
        self._tenant = tenant
        self._deadline = time.monotonic() + waits.seconds
        self._open = ExitStack()
        self._listener: Listener = self._open.enter_context(waits.listeners.listen(job_id))
        self._done = False
        waits.open.add(self)

    def close(self) -> None:
        """Let go of the job, and cancel it if it has not ended. Safe to repeat."""
        self._open.close()
        self._waits.open.discard(self)
        if not self._done and not self.keep:
            self._waits.cancel(self.job_id, self._tenant)
        self._done = True

    def rouse(self) -> None:
        self._listener.rouse()

    async def news(self, timeout: float) -> list[Piece]:
        """Text that has come, or none after `timeout` seconds or when the job has `ended`. Raises `ApiError` 504
        when the time of the whole request is up, 503 when that of the process is."""
        left = 0.0 if self._waits.dismissed else self._deadline - time.monotonic()
        pieces = await self._listener.next(max(0.0, min(timeout, left)))
        if pieces or self.ended:
            return pieces
        goes_on = "it goes on" if self.keep else "it was cancelled"
        if self._waits.dismissed:
            raise ApiError(503, f"the service is being stopped; {goes_on}", code="shutting_down")
        if time.monotonic() >= self._deadline:
            message = f"the request was not done within {self._waits.seconds:g} seconds; {goes_on}"
            raise ApiError(504, message, code="timeout", headers=FINAL)
        return pieces

    @property
    def ended(self) -> bool:
        return self._listener.ended

    async def look(self) -> JobView:
        """The job as it is in SQL now."""
        job = await run_in_threadpool(self._waits.reads.job, self.job_id, tenant=self._tenant)
        assert job is not None  # jobs are never deleted
        if job.state in TERMINAL:
            self._listener.hear((), ended=True)
        return job

    async def end(self) -> JobView:
        """Wait for the job's end. Raises `ApiError` if it is not completed."""
        while not self.ended:
            await self.news(float("inf"))
        return await self.result()

    async def result(self) -> JobView:
        """The ended job. Raises `ApiError` if it is not completed."""
        job = await self.look()
        assert job.state in TERMINAL, "an end is told after its commit"
        self._done = True
        if failure := failure_of(job):
            status, code, message, param = failure
            raise ApiError(status, message, code=code, param=param, headers=FINAL)
        return job


class Waits:
    """Of one api process. `seconds`: how long a request may wait. `open`: those that are not closed."""

    def __init__(self, listeners: Listeners, reads: Reads, cancels: Cancels, seconds: float) -> None:
        self.listeners = listeners
        self.reads = reads
        self.seconds = seconds
        self.open: set[Wait] = set()
        self.dismissed = False
        self._cancels = cancels
        self._chores: set[asyncio.Task[None]] = set()

    def begin(self, job_id: str, tenant: str, *, keep: bool) -> Wait:
        return Wait(self, job_id, tenant, keep=keep)

    def cancel(self, job_id: str, tenant: str) -> None:
        """In a task of its own: whoever left may be cancelled himself right now."""
        chore = asyncio.get_running_loop().create_task(self._cancel(job_id, tenant))
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _cancel(self, job_id: str, tenant: str) -> None:
        try:
            await run_in_threadpool(self._cancels.cancel_job, job_id, tenant=tenant)
        except Exception as error:  # nobody is left to hear of it
            log.warning("waits.cancel_failed job=%s error=%s", job_id, type(error).__name__)

    def dismiss(self) -> None:
        """The process is about to end: nobody waits any longer."""
        self.dismissed = True
        for wait in self.open:
            wait.rouse()

    async def close(self) -> None:
        """Finish the cancels that are on their way, and those of requests that were cut off just now."""
        for wait in list(self.open):
            wait.close()
        await asyncio.gather(*self._chores)
        await self.listeners.close()


async def unless_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """`work`, given up as soon as the client has closed its connection. Raises `ClientDisconnect`."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
