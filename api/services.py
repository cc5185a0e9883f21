"""Services: what the routes need, in one frozen value that `create_app` makes and hands down."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request

from api.errors import ApiError
from jobs.cancels import Cancels
from jobs.intake import Intake
from jobs.reads import Reads
from jobs.settings import Settings

log = logging.getLogger(__name__)
Wake = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    intake: Intake
    reads: Reads
    cancels: Cancels
    wake: Wake

    def wake_workers(self, models: Counter[str]) -> None:
        """Tell Redis that there is work. The jobs are safe in SQL, so a Redis that is down costs time only:
        the sweeper says it again."""
        for model, num_jobs in models.items():
            try:
                self.wake(model, num_jobs)
            except Exception as error:
                log.warning("api.wake_failed model=%s error=%s", model, type(error).__name__)


def refuse_query(request: Request) -> None:
    """A route dependency: query parameters that nobody reads are mistakes."""
    for name in request.query_params:
        shown = name[:80].encode("utf-8", "backslashreplace").decode()
        raise ApiError(400, f"{shown}: unknown query parameter", code="unknown_parameter", param=shown)


def is_id(name: str) -> bool:
    """False for what no id of ours can be; a database would choke on some of it."""
    return len(name) <= 255 and name.isprintable()
