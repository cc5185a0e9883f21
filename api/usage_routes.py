"""Usage routes: what a tenant was billed, what was made beside that, and what it costs.

Owns the HTTP side: the query string, who may ask about whom, and the shape of the answer. Everybody asks about the
own tenant; the scope `admin` also about another one (`tenant=NAME`) or all (`tenant=*`). Costs are decimals in
strings, because a JSON number would lose digits on the way. Prices are set by `nightpress prices` and only read here.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from api.auth import BEARER, By, Caller
from api.errors import ApiError, not_found
from api.parameters import refuse_repeated
from api.schemas import REFUSALS
from api.services import Services
from jobs.bad_field import BadField
from jobs.keys import Scope
from jobs.moments import day_text, parse_moment
from jobs.prices import amount_text
from jobs.states import LedgerKind
from jobs.tenants import check_tenant
from jobs.texts import Name
from jobs.usage import MAX_GROUPS, GroupBy, Tokens, UsageGroup, UsageQuery

ALL: Final = "*"
_FIELDS: Final = {
    GroupBy.DAY: "day",
    GroupBy.TENANT: "tenant",
    GroupBy.MODEL: "model",
    GroupBy.KEY: "key_id",
    GroupBy.BATCH: "batch_id",
}


class _UsageParameters(BaseModel):
    """The query string of GET /v1/usage. `group_by` may be repeated, or hold several words with commas between."""

    model_config = ConfigDict(extra="forbid")

    tenant: Annotated[Name, Field(max_length=63)] | None = None
    group_by: Annotated[list[str], Field(max_length=5)] = []
    start: Annotated[str, Field(max_length=20)] | None = None
    end: Annotated[str, Field(max_length=20)] | None = None
    after: Annotated[str, Field(max_length=4096)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_GROUPS)] = 100


class UsageTokens(BaseModel):
    """`attempts`: how many runs of jobs these are of. `cached_tokens` are among `prompt_tokens`."""

    attempts: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int


class UsageObject(BaseModel):
    """Of the names only those that `group_by` asked for say something; `key_id` and `batch_id` may be null all the
    same. `jobs`: completed ones, which are what is billed."""

    object: Literal["usage"] = "usage"
    day: str | None = None
    tenant: str | None = None
    model: str | None = None
    key_id: str | None = None
    batch_id: str | None = None
    jobs: int
    billed: UsageTokens
    cancelled: UsageTokens
    wasted: UsageTokens
    cost: str | None
    currency: str | None


class UsageList(BaseModel):
    object: Literal["list"] = "list"
    data: list[UsageObject]
    has_more: bool
    next: str | None


def routes(services: Services) -> APIRouter:
    router = APIRouter(
        prefix="/v1/usage",
        tags=["usage"],
        dependencies=[Depends(BEARER)],
        responses=REFUSALS,
    )

    @router.get("")
    def get_usage(query: Annotated[_UsageParameters, Query()], request: Request, caller: By) -> UsageList:
        """Sums by `group_by` (day, tenant, model, key, batch), without it one sum of everything. `start` and `end`,
        which is excluded, are unix seconds or days of UTC. `next` of a page is the `after` of the following one."""
        refuse_repeated(request, but="group_by")
        start = None if query.start is None else parse_moment("start", query.start)
        end = None if query.end is None else parse_moment("end", query.end)
        if start is not None and end is not None and end <= start:
            raise BadField("end", "must be later than start")
        page = services.usages.page(
            UsageQuery(
                tenant=_tenant(services, caller, query.tenant),
                group_by=_group_by(query.group_by),
                start=start,
                end=end,
                after=query.after,
                limit=query.limit,
            )
        )
        return UsageList(
            data=[_object(group) for group in page.groups], has_more=page.next is not None, next=page.next
        )

    return router


def _tenant(services: Services, caller: Caller, asked: str | None) -> str | None:
    if asked is None or asked == caller.tenant:
        return caller.tenant
    if Scope.ADMIN not in caller.scopes:  # whether there is such a tenant or not
        message = "only a key with the scope admin may ask about other tenants"
        raise ApiError(403, message, code="insufficient_permissions", param="tenant")
    if asked == ALL:
        return None
    if not services.tenants.exists(check_tenant(asked)):
        raise not_found("tenant", asked)
    return asked


def _group_by(given: list[str]) -> tuple[GroupBy, ...]:
    words = [word for one in given for word in one.split(",")]
    found: dict[GroupBy, None] = {}
    for word in words:
        if word not in list(GroupBy):
            raise BadField("group_by", f"must be some of {', '.join(GroupBy)}, got {word[:80]!a}")
        if GroupBy(word) in found:
            raise BadField("group_by", f"names {word} twice")
        found[GroupBy(word)] = None
    return tuple(found)


def _object(group: UsageGroup) -> UsageObject:
    names: dict[str, Any] = {_FIELDS[by]: value or None for by, value in group.names.items()}
    if GroupBy.DAY in group.names:
        names["day"] = day_text(group.names[GroupBy.DAY])
    return UsageObject(
        jobs=group.tokens[LedgerKind.BILLED].attempts,
        billed=_tokens(group.tokens[LedgerKind.BILLED]),
        cancelled=_tokens(group.tokens[LedgerKind.CANCELLED]),
        wasted=_tokens(group.tokens[LedgerKind.WASTED]),
        cost=None if group.cost is None else amount_text(group.cost),
        currency=group.currency,
        **names,
    )


def _tokens(tokens: Tokens) -> UsageTokens:
    return UsageTokens(
        attempts=tokens.attempts,
        prompt_tokens=tokens.prompt,
        cached_tokens=tokens.cached,
        completion_tokens=tokens.completion,
        total_tokens=tokens.prompt + tokens.completion,
    )
