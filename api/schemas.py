"""Schemas: what the objects that clients see have in common: pages, errors, usage, times.

Owns these parts and what every route says of its refusals. Times are whole unix seconds. The objects themselves,
under OpenAI's names where OpenAI has them, lie in files by noun, such as `api.job_objects`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from jobs.forecasts import Outlook

UNKNOWN: Final = Outlook()  # of what nobody asked for


class Object(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class Named(Object):
    id: str


N = TypeVar("N", bound=Named)


class PageObject(Object, Generic[N]):
    object: Literal["list"] = "list"
    data: list[N]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[N], has_more: bool) -> Self:
        return cls(
            data=list(data),
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )


class CachedTokens(Object):
    cached_tokens: int


class ReasoningTokens(Object):
    reasoning_tokens: int


class JobError(Object):
    code: str
    message: str
    param: str | None = None


class ErrorBody(Object):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorObject(Object):
    error: ErrorBody


# Of every route: what is refused, and what fails: the database is away (503), an error of ours (500).
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorObject},
    "5XX": {"model": ErrorObject},
}


def whole_seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def seen_ahead(outlook: Outlook) -> dict[str, Any]:
    """Two fields of a job and of a batch. The end is rounded up: a promise is not shortened."""
    end, unserved = outlook
    return {
        "estimated_completion_at": None if end is None else math.ceil(end),
        "unserved_models": None if unserved is None else list(unserved),
    }
