"""CeleryResults: makes `AsyncResult(id)` work for jobs that came in through Redis.

Owns what Celery's result backend is told: STARTED when the job is in SQL, then SUCCESS, FAILURE or REVOKED when
its end is. A copy for convenience, with an expiry; SQL and the API hold the truth. Its own thread, because a
Redis that is away must not hold up the writer; an end that could not be stored is dropped with a word in the log, and
told again by a later sweep (`jobs.teller`), since `on_told` hears only of those that were.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from celery.states import READY_STATES

from jobs.broker import NightpressCelery
from jobs.deadlines import EXPIRED_ERROR
from jobs.failures import UNKNOWN, in_words
from jobs.openai_answers import usage_object
from jobs.outcomes import Outcome, Recorded
from jobs.states import JobState

log = logging.getLogger(__name__)

MAX_PENDING = 10_000
TOLD_TOGETHER = 256


class JobFailedError(RuntimeError):
    """What `AsyncResult.get()` raises for a failed job: code, field if one is to blame, and message."""


class CeleryResults(threading.Thread):
    def __init__(self, app: NightpressCelery) -> None:
        super().__init__(name="celery-results", daemon=True)
        self.backend = app.backend
        # Told the ids of jobs whose end the backend has now.
        self.on_told: Callable[[Sequence[str]], None] = lambda job_ids: None
        self._told: list[str] = []
        self._busy = False
        self._pending: queue.Queue[tuple[str, str, Any] | None] = queue.Queue(MAX_PENDING)

    @property
    def idle(self) -> bool:
        """Nothing waits to be stored."""
        return self._pending.empty() and not self._busy

    def started(self, job_id: str) -> None:
        self._put((job_id, "STARTED", {}))

    def failed(self, job_id: str, error: dict[str, Any]) -> None:
        self._put((job_id, "FAILURE", JobFailedError(in_words(error))))

    def revoked(self, job_id: str) -> None:
        self._put((job_id, "REVOKED", "cancelled"))

    def ended(self, recorded: Recorded) -> None:
        outcome = recorded.outcome
        if recorded.state is JobState.COMPLETED:
            self._put((outcome.job_id, "SUCCESS", answer(outcome, recorded.model)))
        elif recorded.state is JobState.FAILED:
            self.failed(outcome.job_id, outcome.error or UNKNOWN)
        elif recorded.state is JobState.EXPIRED:
            self.failed(outcome.job_id, outcome.error or EXPIRED_ERROR)
        elif recorded.state is JobState.CANCELLED:
            self.revoked(outcome.job_id)

    def stop(self, timeout: float) -> None:
        """Store what is pending, within `timeout` seconds."""
        self._put(None)
        if self.is_alive():
            self.join(timeout)

    def _put(self, item: tuple[str, str, Any] | None) -> None:
        try:
            self._pending.put_nowait(item)
        except queue.Full:
            log.warning("celery_results.full: one result is only in SQL")

    def run(self) -> None:
        while (item := self._pending.get()) is not None:
            self._busy = True
            job_id, state, value = item
            try:
                self._store(job_id, state, value)
            except Exception as error:
                log.warning("celery_results.failed job=%.80a error=%s", job_id, type(error).__name__)
            else:
                if state in READY_STATES:
                    self._told.append(job_id)
            if self._told and (self._pending.empty() or len(self._told) >= TOLD_TOGETHER):
                self._say_told()
            self._busy = False
        self._say_told()

    def _store(self, job_id: str, state: str, value: Any) -> None:
        if state == "STARTED":
            self.backend.ensure(self._begin, (job_id,))
        elif state == "REVOKED":
            self.backend.mark_as_revoked(job_id, reason=value)
        elif state == "FAILURE":
            self.backend.mark_as_failure(job_id, value)
        else:
            self.backend.store_result(job_id, value, state)

    def _begin(self, job_id: str) -> None:
        """In one step with the look whether anything is known: another worker, which has the job meanwhile, may tell
        of its end right now, and nobody would tell of that again."""
        meta = self.backend._get_result_meta({}, "STARTED", None, None) | {"task_id": job_id}
        key, value = self.backend.get_key_for_task(job_id), self.backend.encode(meta)
        if self.backend.client.set(key, value, ex=self.backend.expires or None, nx=True):
            self.backend.client.publish(key, value)

    def _say_told(self) -> None:
        told, self._told = self._told, []
        try:
            if told:
                self.on_told(told)
        except Exception as error:  # then they are told once more
            log.warning("celery_results.unmarked jobs=%d error=%s", len(told), type(error).__name__)


def answer(outcome: Outcome, model: str) -> dict[str, Any]:
    """The JSON that `AsyncResult.get()` returns; `text` is the first output's, and so is `reasoning`, if any."""
    return {
        "id": outcome.job_id,
        "object": "job",
        "status": "completed",
        "model": model,
        **{name: value for name, value in outcome.outputs[0].items() if name in ("text", "reasoning")},
        "outputs": outcome.outputs,
        "usage": usage_object(
            outcome.prompt_tokens, outcome.completion_tokens, outcome.cached_tokens, outcome.outputs
        ),
    }
