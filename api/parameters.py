"""Parameters: what routes ask of a request beside its body: query string, ids in its path, `Idempotency-Key`.

Owns the refusal of what nobody would read. Refuses to know what the parameters mean.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from fastapi import Request
from pydantic import Field

from api.errors import ApiError, shown_name
from jobs.bad_field import BadField
from jobs.idempotency import Submit

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # a moment in a query string


async def refuse_query(request: Request) -> None:
    """A route dependency: query parameters that nobody reads are mistakes."""
    for name in request.query_params:
        shown = shown_name(name)
        raise ApiError(400, f"{shown}: unknown query parameter", code="unknown_parameter", param=shown)


async def refuse_repeats(request: Request) -> None:
    """A route dependency: of a query parameter that is given twice, only one would count."""
    refuse_repeated(request)


def refuse_repeated(request: Request, *, but: str | None = None) -> None:
    """The same, `but` for one that may be given often."""
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if times > 1 and name != but:
            shown = shown_name(name)
            raise ApiError(400, f"{shown}: is given {times} times", code="invalid_value", param=shown)


def submit_of(request: Request, data: object) -> Submit | None:
    """The client's `Idempotency-Key`, with what it came with. Raises `BadField`."""
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1:
        raise BadField("idempotency-key", f"is given {len(keys)} times", "invalid_header")
    return Submit.of(keys[0], data) if keys else None


def is_id(name: str) -> bool:
    """False for what no id of ours can be; a database would choke on some of it."""
    return len(name) <= 255 and name.isprintable()
