"""Transport: kombu's Redis transport, which lives on where kombu's own takes the worker along.

Owns what happens to a message that nobody can read, and to a Redis that answers with errors (full, a replica, cannot
save). Such a message is dropped for good, with a line that tells nothing of what is in it. A server that refuses to
be read from is connected to anew and asked again; one that refuses only to keep books on a message does not keep the
message from its row in SQL.

Source: `kombu.transport.redis` and `kombu.transport.virtual` of 5.7, whose inner methods are overridden here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis, virtual
from redis.exceptions import RedisError, ResponseError

log = logging.getLogger(__name__)

NAME = "nightpress"  # what kombu calls this transport, as the scheme of a URL
PAUSE_SECONDS = 1.0  # after a refusal, before the server is asked for messages again
PUT_BACK_SECONDS = 5.0  # for a server to take back, at a stop, what is known here alone
PUT_BACK_PAUSE = 0.2


def kombu_url(broker: str) -> str:
    """A broker's URL (redis://, rediss://, redis+socket://) that makes kombu take this transport."""
    scheme, rest = broker.split(":", 1)
    return f"{NAME}+socket:{rest}" if scheme == "redis+socket" else f"{NAME}:{rest}"


class QoS(redis.QoS):
    """The books on messages that are not acked yet. What Redis does not take down is known here alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._only_here: dict[Any, Any] = {}  # by delivery tag
        self._refused = False

    def append(self, message: Any, delivery_tag: Any) -> None:
        try:
            super().append(message, delivery_tag)
            self._refused = False
        except RedisError as error:
            if not self._refused:  # said once, not for every message until Redis takes them again
                log.warning("redis.keeps_no_books error=%s", _said_by(error))
            self._refused = True
            virtual.QoS.append(self, message, delivery_tag)
            self._only_here[delivery_tag] = message

    def ack(self, delivery_tag: Any) -> None:
        # A message whose ack is lost comes again, and finds its row. AttributeError: the channel's connection was
        # lost and closed, and kombu has forgotten where it led.
        try:
            super().ack(delivery_tag)
        except (RedisError, OSError, AttributeError) as error:
            log.debug("redis.ack_lost error=%s", _said_by(error))
            self._quick_ack(delivery_tag)
        self._only_here.pop(delivery_tag, None)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        if not requeue:
            self.ack(delivery_tag)  # the same to Redis
            return
        super().reject(delivery_tag, requeue=True)
        self._only_here.pop(delivery_tag, None)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        if (message := self._only_here.get(tag)) is None:
            super().restore_by_tag(tag, client=client, leftmost=leftmost)
            return
        to = message.delivery_info
        with self.channel.conn_or_acquire(client) as client, client.pipeline() as pipe:
            self.channel._do_restore_message(
                message._raw, to.get("exchange"), to.get("routing_key"), pipe, leftmost
            )
            pipe.execute()

    def restore_unacked(self, client: Any = None) -> None:
        # kombu's would put nothing back of what comes behind one that is refused.
        until = time.monotonic() + PUT_BACK_SECONDS
        with self.channel.conn_or_acquire(client) as client:
            for tag, message in list(self._delivered.items()):
                self._put_back(tag, message, client, until)
        self._delivered.clear()

    def _put_back(self, tag: Any, message: Any, client: Any, until: float) -> None:
        while True:
            try:
                return self.restore_by_tag(tag, client=client)
            except ResponseError as error:
                if tag not in self._only_here:
                    return None  # Redis has it in its books, from which it comes again
                if time.monotonic() > until:
                    lost = (message.headers or {}).get("id")
                    log.error("redis.lost task=%.80a error=%s", lost, _said_by(error))
                    return None
            time.sleep(PUT_BACK_PAUSE)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        # kombu would raise from here into whoever closes the channel, and so end the worker.
        try:
            super().restore_unacked_once(stderr)
        except Exception as error:
            log.warning("redis.not_put_back error=%s", _said_by(error))

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        with _refusals("restore"):
            super().restore_visible(*args, **kwargs)


class Channel(redis.Channel):
    QoS = QoS
    _refused = False
    _quiet_until = 0.0

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], consumer_tag: str, **kwargs: Any
    ) -> None:
        super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        deliver = self.connection._callbacks[queue]

        def deliver_or_drop(raw: Any) -> None:
            try:
                deliver(raw)
            except Exception as error:
                # Commands come without an ack; what Redis does to the answers is for Celery's loop to know.
                if no_ack and isinstance(error, RedisError | OSError):
                    raise
                log.warning("redis.message_refused error=%s", type(error).__name__)
                self._drop(raw)

        self.connection._callbacks[queue] = deliver_or_drop

    def _drop(self, raw: Any) -> None:
        """Out of the books, if it got that far: else it would come again, and to the next worker."""
        try:
            tag = raw["properties"]["delivery_tag"]
            is_known = tag in self.qos._delivered
        except (TypeError, KeyError):
            return
        if is_known:
            self.basic_reject(tag)

    def _brpop_start(self, timeout: float | None = None) -> None:
        if time.monotonic() >= self._quiet_until:
            super()._brpop_start(timeout)

    def _brpop_read(self, **options: Any) -> bool:
        try:
            with _unreadable():
                super()._brpop_read(**options)
        except Empty:
            self._refused = False
            raise
        except ResponseError as error:
            self._pause(error)
            raise Empty from None
        self._refused = False
        return True

    def _receive_one(self, c: Any) -> Any:
        with _unreadable():
            return super()._receive_one(c)

    def _pause(self, error: ResponseError) -> None:
        if not self._refused:  # said once, not every second until it reads again
            log.warning("redis.refuses error=%s", _said_by(error))
        self._refused = True
        self._quiet_until = time.monotonic() + PAUSE_SECONDS
        # Its place may have been taken by another server at the same address.
        self.client.connection.disconnect()
        self.pool.disconnect()

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        # Only exchanges look at bindings, and all that is sent to these queues is sent by their names.
        with _refusals("bind"):
            super()._queue_bind(exchange, routing_key, pattern, queue)

    def maybe_refresh_binding_expiry(self) -> None:
        with _refusals("refresh"):
            super().maybe_refresh_binding_expiry()


class Transport(redis.Transport):
    Channel = Channel


TRANSPORT_ALIASES[NAME] = f"{__name__}:{Transport.__name__}"


@contextmanager
def _unreadable() -> Iterator[None]:
    """For errors of a message's JSON; those of what it says are caught where it is delivered."""
    try:
        yield
    except (Empty, RedisError, OSError):
        raise
    except Exception as error:
        log.warning("redis.message_unreadable error=%s", type(error).__name__)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """For writes that a worker can do without until Redis takes writes again."""
    try:
        yield
    except ResponseError as error:
        log.debug("redis.refused what=%s error=%s", what, _said_by(error))


def _said_by(error: Exception) -> str:
    """Without the command, which redis-py quotes of a pipeline: a message is in it."""
    return f"{type(error).__name__}: {str(error).rpartition(' of pipeline caused error: ')[2]}"
