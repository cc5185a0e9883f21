"""The worker process from its first line to its exit status.

Owns logging and the start of Celery's worker with our settings. Blocks until the worker has left; SIGTERM and
SIGINT drain it (exit status 0), a model that cannot be served ends it with a reason.
"""

from __future__ import annotations

import logging
import sys
import warnings

from celery.apps.worker import Worker, install_worker_int_handler
from celery.platforms import EX_OK, SecurityWarning

from jobs.broker import GENERATE_QUEUE, make_app, work_queue
from jobs.settings import Settings

log = logging.getLogger(__name__)


def _without_bodies(record: logging.LogRecord) -> bool:
    """Celery reports messages that it refuses (unknown task, undecodable) with their whole body."""
    if isinstance(record.msg, str) and "body" in record.msg:
        record.msg, record.args, record.exc_info = (
            "celery refused a message that is no task of ours",
            (),
            None,
        )
    return True


class _Worker(Worker):  # type: ignore[misc]
    def install_platform_tweaks(self, worker: Worker) -> None:
        super().install_platform_tweaks(worker)
        # Celery's own drains as well, but calls that a failure.
        install_worker_int_handler(worker, exitcode=EX_OK)


def main(settings: Settings) -> int:
    """Run one worker; returns the process's exit status."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    # Celery would log messages with what is in them: prompts have no place in a log.
    logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)
    logging.getLogger("celery.pool").setLevel(logging.INFO)
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_without_bodies)
    if not settings.model:
        sys.stderr.write("NIGHTPRESS_MODEL: name the model to serve (a folder, a GGUF file or a hub id)\n")
        return 2
    # Said of root because of pickle; JSON is all that we accept (`broker`).
    warnings.filterwarnings("ignore", category=SecurityWarning)
    app = make_app(settings)
    try:
        worker = _Worker(
            app=app,
            queues=[GENERATE_QUEUE, work_queue(settings.served_model)],
            loglevel=settings.log_level.upper(),
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            optimization="fair",
            quiet=True,
        )
    except (ValueError, OSError) as error:  # of the checkpoint, its tokenizer or the engine's settings
        sys.stderr.write(f"NIGHTPRESS_MODEL: {settings.model} cannot be served: {error}\n")
        return 2
    worker.start()
    return int(worker.exitcode or 0)
