"""The Celery application: names of tasks and queues, and every setting that makes the hand-off safe.

Owns how Redis is spoken to. Redis is the queue, never the truth: messages are acked early (after the SQL
commit, see `pool`), nothing is prefetched, JSON is the only serializer. Nobody runs task bodies: the pool
takes the messages itself.
"""

from __future__ import annotations

from typing import Any, NoReturn

from celery import Celery
from kombu.entity import Queue
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from jobs.redis_transport import kombu_url
from jobs.settings import Settings

GENERATE = "nightpress.generate"  # a whole job, from services that know only Redis
WORK = "nightpress.work"  # a wake-up: there is work for a model
GENERATE_QUEUE = "generate"

MAX_UNACKED = 256  # messages taken in and not yet committed to SQL
SOCKET_SECONDS = 10.0
RESULT_SECONDS = 24 * 3600


def work_queue(model: str) -> str:
    return f"work.{model}"


class NightpressCelery(Celery):  # type: ignore[misc]
    """The application, with the settings it was made from for the pool to find."""

    settings: Settings


def make_app(settings: Settings) -> NightpressCelery:
    """The application of workers and of the API. Connects to nothing yet."""
    app = NightpressCelery(
        "nightpress", broker=kombu_url(settings.broker), backend=settings.broker, set_as_current=False
    )
    app.settings = settings
    app.Task.Request = "jobs.pool:PlainRequest"
    app.conf.update(
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=MAX_UNACKED,
        worker_pool="jobs.pool:EnginePool",
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_enable_remote_control=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_queues=[Queue(GENERATE_QUEUE), Queue(work_queue(settings.served_model))],
        task_default_queue=GENERATE_QUEUE,
        task_create_missing_queues=True,
        result_expires=RESULT_SECONDS,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # an error that Redis answers with is a reason to reconnect, not to die
        broker_connection_timeout=SOCKET_SECONDS,
        broker_transport_options={
            "visibility_timeout": 300,
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": SOCKET_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        redis_socket_timeout=SOCKET_SECONDS,
        redis_socket_connect_timeout=SOCKET_SECONDS,
        redis_backend_health_check_interval=10,
        result_backend_transport_options={"retry_policy": {"timeout": 2.0}},
    )
    # Registered so that a consumer accepts them.
    app.task(_taken_by_the_pool, name=GENERATE)
    app.task(_taken_by_the_pool, name=WORK, ignore_result=True)
    return app


def server_info(url: str, timeout: float) -> dict[str, Any]:
    """What a server says of itself (`INFO`), by redis-py's URL. Raises `OSError` where none answers in `timeout`
    seconds or nobody may ask."""
    try:
        with Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
        ) as client:
            return dict(client.info())
    except RedisError as error:
        raise OSError(str(error)) from None


def _taken_by_the_pool(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("run by jobs.pool:EnginePool only; start workers with `nightpress worker`")
