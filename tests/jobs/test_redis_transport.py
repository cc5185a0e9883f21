"""Transport: kombu takes ours by the URL, and what Redis would not take down goes back to it all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from kombu import Connection

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
