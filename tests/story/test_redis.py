"""Redis holds what nobody can read, is full, or takes no writes: workers live on, and nothing is lost."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from kombu import pools

from jobs.models import Job
from jobs.states import JobState, WorkerState
from tests.support.bare_celery import QUEUE, TASK, bare_celery
from tests.support.press import START_SECONDS, Press
from tests.support.processes import Process
from tests.support.waiting import wait_until

BODY = {"prompt": "x", "max_tokens": 2, "ignore_eos": True}
SECRET = "a prompt that is in no log"


def envelope(**changes: Any) -> dict[str, Any]:
    """A message as Celery writes it; `changes` of the envelope itself, or of its `headers` or its `properties`."""
    message: dict[str, Any] = {
        "body": base64.b64encode(json.dumps([[], BODY, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": TASK, "id": "bad", "argsrepr": SECRET},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "delivery_mode": 2,
            "delivery_tag": "bad-tag",
            "priority": 0,
        },
    }
    for part in ("headers", "properties"):
        message[part] |= changes.pop(part, {})
    return message | changes


def encoded(body: Any) -> str:
    return base64.b64encode(json.dumps(body).encode()).decode()


UNREADABLE: dict[str, Any] = {
    "body is a list of one": envelope(body=encoded([SECRET])),
    "body is an object": envelope(body=encoded({SECRET: 1})),
    "body is null": envelope(body=encoded(None)),
    "body is a number": envelope(body=encoded(7)),
    "body is no base64": envelope(body="\u00e4"),
    "task is an object": envelope(headers={"task": {SECRET: 1}}),
    "task is unknown": envelope(headers={"task": SECRET, "id": {SECRET: 1}}),
    "id is a list": envelope(headers={"id": [SECRET]}),
    "no id": {**envelope(), "headers": {"task": TASK}},
    "headers is a list": {**envelope(), "headers": [SECRET]},
    "eta is an object": envelope(headers={"eta": {SECRET: 1}}),
    "tag is a list": envelope(properties={"delivery_tag": [SECRET]}),
    "unknown encoding": envelope(properties={"body_encoding": SECRET}),
    "no properties": {"body": SECRET},
    "a list": [SECRET],
    "a string": SECRET,
    "no JSON": "{" + SECRET,
    "nested too deep": "[" * 100_000,
    "no text": b"\xff\xfe",
    "no such type": {"__type__": "uuid", "__value__": SECRET},
}
ONLY_STRANGE = {
    "a time limit is a text": {"timelimit": SECRET},
    "its other name is an object": {"shadow": {SECRET: 1}},
}


def push(press: Press, message: Any) -> None:
    raw = message if isinstance(message, str | bytes) else json.dumps(message)
    with redis.Redis.from_url(press.redis_url) as client:
        client.lpush(QUEUE, raw)


def ask(press: Press, worker: Process) -> None:
    """What is sent to Redis after all of this is answered."""
    with bare_celery(press.redis_url) as app:
        sent = app.send_task(TASK, kwargs=BODY, queue=QUEUE)
        wait_until(lambda: sent.ready() or not worker.alive, "it is answered", START_SECONDS)
        assert worker.alive, worker.tail()
        assert sent.get()["usage"]["completion_tokens"] == 2


def test_messages_that_nobody_can_read_harm_only_themselves(press: Press) -> None:
    (worker,) = press.start_workers(1)
    before = len(worker.text())
    for what, message in UNREADABLE.items():
        push(press, message)
        ask(press, worker)
        assert "refused" in worker.text()[before:] or "unreadable" in worker.text()[before:], what
    with redis.Redis.from_url(press.redis_url) as client:
        wait_until(lambda: not client.hlen("unacked"), "none of them will come again")
    assert SECRET not in worker.text()
    assert "Traceback" not in worker.text()[before:]
    press.finish()


@pytest.mark.parametrize("command", ["[" * 100_000, '{"__type__": "bytes", "__value__": 1}', "[1]", "{}"])
def test_commands_that_nobody_can_read_harm_nobody(press: Press, command: str) -> None:
    (worker,) = press.start_workers(1)
    with redis.Redis.from_url(press.redis_url) as client, bare_celery(press.redis_url) as app:
        database = client.get_connection_kwargs().get("db", 0)
        heard = f"/{database}.celery.pidbox"
        wait_until(lambda: client.publish(heard, command), "it hears of it", START_SECONDS)
        wait_until(lambda: app.control.ping(timeout=1) or not worker.alive, "it hears the next one")
    assert worker.alive, worker.tail()


def test_what_celery_may_be_asked_for_and_nobody_keeps_is_passed_over(press: Press) -> None:
    (worker,) = press.start_workers(1)
    for number, headers in enumerate(ONLY_STRANGE.values()):
        tag = {"delivery_tag": f"strange-{number}"}
        push(press, envelope(headers={"id": f"strange-{number}", **headers}, properties=tag))
        wait_until(
            lambda name=f"strange-{number}": press.jobs(Job.id == name, Job.state == JobState.COMPLETED),
            "it is done",
            START_SECONDS,
        )
    with redis.Redis.from_url(press.redis_url) as client:
        wait_until(lambda: not client.hlen("unacked"), "both are acked")
    assert worker.alive
    press.finish()


@contextmanager
def our_redis(press: Press) -> Iterator[redis.Redis]:
    """For what is not done to a server that others may use."""
    if press.redis_server is None:
        pytest.skip("the Redis that was given is not ours to change")
    with redis.Redis.from_url(press.redis_url) as client:
        yield client


def test_redis_is_full(press: Press) -> None:
    """Messages that are popped now can be written down nowhere but in SQL."""
    workers = press.start_workers(2)
    with our_redis(press) as client, bare_celery(press.redis_url) as app:
        for worker in workers:
            worker.signal(signal.SIGSTOP)
        sent = [app.send_task(TASK, kwargs=BODY, queue=QUEUE).id for _ in range(20)]
        client.config_set("maxmemory", 1)
        try:
            for worker in workers:
                worker.signal(signal.SIGCONT)
            in_sql = Job.id.in_(sent)
            wait_until(
                lambda: len(press.jobs(in_sql, Job.state == JobState.COMPLETED)) == 20,
                "what was sent is done",
                START_SECONDS,
            )
            late = press.start("worker", ["worker"])
            wait_until(lambda: ready(press, late), "one that starts now is ready", START_SECONDS)
            press.submit_one(BODY)
            press.finish()
        finally:
            client.config_set("maxmemory", 0)
        workers.append(late)
        assert all(worker.alive for worker in workers), workers[0].tail()
        for worker in workers:
            ask(press, worker)
        wait_until(lambda: not client.hlen("unacked"), "all that was taken down is acked")
    press.finish()


def test_redis_dies_while_messages_wait_for_sql(press: Press) -> None:
    """They are in no row yet, and their acks belong to a connection that is gone."""
    (worker,) = press.start_workers(1)
    with redis.Redis.from_url(press.redis_url) as client, locked_jobs(press):
        with bare_celery(press.redis_url) as app:
            sent = [app.send_task(TASK, kwargs=BODY, queue=QUEUE).id]
        wait_until(lambda: client.hlen("unacked") == 1, "a worker has taken it")
        press.kill_redis()
        press.revive_redis()
        pools.reset()  # ours, which kombu would keep for the stories to come, broken as they are
        with bare_celery(press.redis_url) as app:
            sent.append(app.send_task(TASK, kwargs=BODY, queue=QUEUE).id)
        wait_until(
            lambda: not client.llen(QUEUE) or not worker.alive, "it has come back for more", START_SECONDS
        )
    done = (Job.id.in_(sent), Job.state == JobState.COMPLETED)
    wait_until(lambda: len(press.jobs(*done)) == 2 or not worker.alive, "both are done", START_SECONDS)
    assert worker.alive, worker.tail()
    press.finish()
    press.flush_redis()  # of what was not acked, which would come again in five minutes


@contextmanager
def locked_jobs(press: Press) -> Iterator[None]:
    """Nobody writes a job meanwhile."""
    with press.database.write() as connection:
        if not press.database.is_sqlite:
            connection.exec_driver_sql("LOCK TABLE jobs IN EXCLUSIVE MODE")
        yield


def ready(press: Press, worker: Process) -> bool:
    assert worker.alive, worker.tail()
    row = press.worker(worker)
    return row is not None and row["state"] == WorkerState.READY


def test_redis_becomes_a_replica_and_a_primary_again(press: Press) -> None:
    workers = press.start_workers(2)
    with our_redis(press) as client:
        client.replicaof("127.0.0.1", 1)
        try:
            press.submit_one(BODY)
            press.finish()
            late = press.start("worker", ["worker"])
            wait_until(lambda: ready(press, late), "one that starts now is ready", START_SECONDS)
            for worker in (*workers, late):
                wait_until(
                    lambda worker=worker: "redis.refuses" in worker.text() or not worker.alive,
                    "it has heard of it",
                    START_SECONDS,
                )
        finally:
            client.replicaof("NO", "ONE")
        assert all(worker.alive for worker in (*workers, late)), workers[0].tail()
        ask(press, late)
        assert late.text().count("redis.refuses") == 1, "said once"
        for worker in workers:
            worker.terminate(START_SECONDS)
        ask(press, late)
    press.finish()
