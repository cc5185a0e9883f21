"""Broadcast: the thread that tells listeners through Redis what their jobs say, and when they have ended.

Owns the texts of the jobs that somebody reads along (`growing_text`), and what of them Redis has. Only jobs with an
`audience` come here. Redis may be slow or away: then nothing is said for a moment, the engine's reader and the writer
are never held up, and the listeners find the result in SQL.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from engine.growth import Growth
from engine.reasoning import ReasoningFormat
from engine.request import Begins, RequestId
from engine.tokenizer import Tokenizer
from jobs.audience import LIFE_SECONDS, MAX_ENTRIES, Piece, end_entry, pieces_entry, stream_name
from jobs.growing_text import GrowingSample

log = logging.getLogger(__name__)

SOCKET_SECONDS = 1.0
QUIET_SECONDS = 1.0  # after a failure


class _Speech:
    """The samples of one request, and how many characters of each of their texts Redis has."""

    def __init__(self, samples: list[GrowingSample]) -> None:
        self.samples = samples
        self._told = [{True: 0, False: 0} for _ in samples]  # by whether it is the reasoning

    def news(self) -> list[Piece]:
        return [
            Piece(index, told, text.read(told), is_reasoning)
            for index, sample in enumerate(self.samples)
            for is_reasoning, text in ((True, sample.reasoning), (False, sample.answer))
            if text.certain > (told := self._told[index][is_reasoning])
        ]

    def note(self, pieces: Sequence[Piece]) -> None:
        """Redis has them."""
        for piece in pieces:
            self._told[piece.sample][piece.is_reasoning] = piece.at + len(piece.text)


class Broadcast(threading.Thread):
    """`put`, `over` and `forget` may be called from any thread and never block. `stop_of(id)`: the stop strings of a
    request, None when it is no longer held. `reasoning`: how this model marks what it thinks."""

    def __init__(
        self,
        redis_url: str,
        tokenizer: Tokenizer,
        stop_of: Callable[[RequestId], Sequence[str] | None],
        reasoning: ReasoningFormat | None = None,
    ) -> None:
        super().__init__(name="broadcast", daemon=True)
        self._redis = Redis.from_url(
            redis_url,
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=SOCKET_SECONDS,
            retry=Retry(NoBackoff(), 1),  # a connection that the server closed while it was idle
        )
        self._tokenizer = tokenizer
        self._stop_of = stop_of
        self._reasoning = reasoning
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._speeches: dict[RequestId, _Speech] = {}
        self._changed: dict[RequestId, None] = {}  # ordered
        self._ended: list[str] = []  # job ids
        self._quiet_until = 0.0

    def put(self, growths: Sequence[Growth]) -> None:
        """What requests have made since they were last told of (`engine.wire.Streamed`)."""
        self._inbox.put(lambda: self._grow(growths))

    def over(self, request_id: RequestId, *, ended: bool) -> None:
        """This attempt is over. `ended`: so is the job, and that is committed."""
        self._inbox.put(lambda: self._over(request_id, ended))

    def forget(self) -> None:
        """None of the jobs is ours any more."""
        self._inbox.put(self._speeches.clear)

    def stop(self, timeout: float) -> None:
        """Say what is pending, within `timeout` seconds."""
        self._inbox.put(None)
        if self.is_alive():
            self.join(timeout)
        self._redis.close()

    def run(self) -> None:
        last = False
        while not last:
            item = self._inbox.get()
            while item is not None:
                self._do(item)
                try:
                    item = self._inbox.get_nowait()
                except queue.Empty:
                    break
            last = item is None
            self._say()

    def _do(self, item: Callable[[], None]) -> None:
        try:
            item()
        except Exception:  # of a tokenizer: who listens to this job gets its text when it has ended
            log.exception("broadcast.failed")

    def _grow(self, growths: Sequence[Growth]) -> None:
        for growth in growths:
            speech = self._speeches.get(growth.id)
            if speech is None:
                if (stop := self._stop_of(growth.id)) is None:
                    continue
                samples = [self._sample(growth.begins, stop) for _ in growth.starts]
                speech = self._speeches[growth.id] = _Speech(samples)
            for sample, start, made in zip(speech.samples, growth.starts, growth.generated, strict=True):
                sample.push(start, made.token_ids)
            self._changed[growth.id] = None

    def _sample(self, begins: Begins, stop: Sequence[str]) -> GrowingSample:
        splitter = self._reasoning.splitter(begins) if self._reasoning else None
        return GrowingSample(self._tokenizer, stop, splitter)

    def _over(self, request_id: RequestId, ended: bool) -> None:
        self._speeches.pop(request_id, None)  # the rest of its text is in SQL
        if ended:
            self._ended.append(request_id.job_id)

    def _say(self) -> None:
        """All that is new, in one round trip."""
        changed, self._changed = [key for key in self._changed if key in self._speeches], {}
        ended, self._ended = self._ended, []
        news = {key: pieces for key in changed if (pieces := self._speeches[key].news())}
        if time.monotonic() < self._quiet_until or not (news or ended):
            return
        try:
            with self._redis.pipeline(transaction=True) as pipe:  # no stream without an expiry
                for job_id, entry in [
                    *((key.job_id, pieces_entry(pieces)) for key, pieces in news.items()),
                    *((job_id, end_entry()) for job_id in ended),
                ]:
                    name = stream_name(job_id)
                    pipe.xadd(name, entry, maxlen=MAX_ENTRIES, approximate=True)
                    pipe.expire(name, LIFE_SECONDS)
                pipe.execute()
        except (RedisError, OSError) as error:
            log.warning("broadcast.redis error=%s", type(error).__name__)
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            return
        for key, pieces in news.items():
            self._speeches[key].note(pieces)
