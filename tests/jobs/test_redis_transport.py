"""Transport: kombu takes ours by the URL, and what Redis would not take down goes back to it all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from kombu import Connection

from jobs import redis_transport
from jobs.broker import GENERATE_QUEUE
from jobs.redis_transport import Transport, kombu_url
from tests.support.bare_celery import celery_url
from tests.support.servers import ValkeyServer


@pytest.mark.parametrize(
    "url",
    [
        "redis://:word@host:1/2",
        "rediss://name:word@host:1/2?ssl_cert_reqs=required",
        "redis+socket:///a/b.sock?virtual_host=3",
    ],
)
def test_a_url_says_the_same_to_our_transport(url: str) -> None:
    theirs, ours = Connection(url), Connection(kombu_url(url))
    assert isinstance(ours.transport, Transport)
    for what in ("hostname", "port", "virtual_host", "userid", "password", "ssl"):
        assert getattr(ours, what) == getattr(theirs, what), what


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    server = ValkeyServer()  # the one of the session may be a developer's, and is not made smaller
    yield server
    server.stop()


def test_what_redis_would_not_take_down_goes_back_to_it(server: ValkeyServer) -> None:
    with (
        redis.Redis.from_url(server.url) as client,
        Connection(kombu_url(celery_url(server.url))) as connection,
    ):
        channel = connection.default_channel
        for text in ("acked", "kept"):
            with connection.Producer(serializer="json") as producer:
                producer.publish({"text": text}, routing_key=GENERATE_QUEUE)
        client.config_set("maxmemory", 1)
        acked, kept = (channel.basic_get(GENERATE_QUEUE) for _ in range(2))
        assert (acked.payload, kept.payload) == ({"text": "acked"}, {"text": "kept"})
        assert (client.llen(GENERATE_QUEUE), client.hlen("unacked")) == (0, 0)
        acked.ack()
        client.config_set("maxmemory", 0)
        channel.close()
        assert client.llen(GENERATE_QUEUE) == 1
        again = connection.channel().basic_get(GENERATE_QUEUE)
        assert again.payload == {"text": "kept"}
        again.ack()
        assert client.hlen("unacked") == 0


def test_what_redis_takes_back_only_after_a_while_is_not_lost(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that stops while Redis is full, before SQL has its messages."""
    with (
        redis.Redis.from_url(server.url) as client,
        Connection(kombu_url(celery_url(server.url))) as connection,
    ):
        channel = connection.default_channel
        with connection.Producer(serializer="json") as producer:
            producer.publish({"text": "kept"}, routing_key=GENERATE_QUEUE)
        client.config_set("maxmemory", 1)
        assert channel.basic_get(GENERATE_QUEUE).payload == {"text": "kept"}
        monkeypatch.setattr(redis_transport.time, "sleep", lambda seconds: client.config_set("maxmemory", 0))
        channel.close()
        assert client.llen(GENERATE_QUEUE) == 1


def test_one_that_redis_will_not_take_back_loses_no_other(
    server: ValkeyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_transport, "PUT_BACK_SECONDS", 0.0)
    with (
        redis.Redis.from_url(server.url) as client,
        Connection(kombu_url(celery_url(server.url))) as connection,
    ):
        channel = connection.default_channel
        with connection.Producer(serializer="json") as producer:
            for queue in ("odd", GENERATE_QUEUE):
                producer.publish({"text": "secret"}, routing_key=queue, headers={"id": f"of {queue}"})
        client.config_set("maxmemory", 1)
        for queue in ("odd", GENERATE_QUEUE):
            assert channel.basic_get(queue).payload == {"text": "secret"}
        client.config_set("maxmemory", 0)
        client.set("odd", "no list")
        channel.close()
        assert client.llen(GENERATE_QUEUE) == 1
    assert "redis.lost task='of odd'" in caplog.text
    assert "WRONGTYPE" in caplog.text
    assert not any(word in caplog.text for word in ("secret", "body"))
