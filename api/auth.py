"""The gate: whether a request comes in, and as whom. Deny by default; public are exactly `/health` and `/ready`.

Owns one ASGI layer in front of every route, also of those that do not exist. It looks at the scope that the server
made (`path`, `method`, `headers`, `client`), never at a URL put together from the Host header. As long as no key
exists, it lets in programs on this machine only, as tenant `default` with every scope; from the first key on,
everybody needs one, on this machine too. A key is found by its public part and compared by hash in constant time.

What a method may do is one rule: GET reads, POST, PATCH and DELETE submit, anything else and all of `/v1/admin/`
needs `admin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends
from fastapi.security import HTTPBearer
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import NO_DATABASE, ApiError, database_unreachable, envelope
from api.known_keys import KnownKeys
from api.loopback import is_loopback
from jobs.key_text import BadKey, KeyText, parse_key
from jobs.keys import ALL_SCOPES, Keys
from jobs.keys import Scope as KeyScope
from jobs.tenants import OPERATOR, Owner

PUBLIC: Final = frozenset({"/health", "/ready"})
_NEEDED: Final = {
    "GET": KeyScope.READ,
    "HEAD": KeyScope.READ,
    "POST": KeyScope.SUBMIT,
    "PATCH": KeyScope.SUBMIT,
    "DELETE": KeyScope.SUBMIT,
}
_NO_HASH: Final = "0" * 64  # compared with when there is no such key, so that this takes as long


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: for whom, by which key, and what that key may do."""

    owner: Owner
    scopes: frozenset[KeyScope]

    @property
    def tenant(self) -> str:
        return self.owner.tenant


async def caller_of(request: Request) -> Caller:
    """The caller whom the gate let in. Without a gate there is none, and this raises. Like every dependency that
    waits for nothing it is `async`, because FastAPI gives each of the others a thread."""
    caller = request.scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller


By = Annotated[Caller, Depends(caller_of)]  # of a route's parameter
BEARER = HTTPBearer(auto_error=False)  # a word in /openapi.json; who comes in is the gate's


def needed_scope(method: str, path: str) -> KeyScope:
    if path.startswith("/v1/admin/"):
        return KeyScope.ADMIN
    return _NEEDED.get(method, KeyScope.ADMIN)


class Gate:
    """ASGI. Puts the `Caller` into the request's state, or answers 401, 403, 421 or 503 itself."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._known = KnownKeys(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # none of our routes speaks anything else
            return
        try:
            caller = await self._admit(scope)
        except ApiError as error:
            answer = envelope(
                error.status, error.message, code=error.code, param=error.param, headers=error.headers
            )
            await answer(scope, receive, send)
            return
        except NO_DATABASE as error:
            await database_unreachable(scope, error)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)
        key_id = None if caller is None else caller.owner.key_id
        if key_id is not None:  # after the answer, which this must not delay
            await self._known.note_use(key_id)

    async def _admit(self, scope: Scope) -> Caller | None:
        """None on public routes. Raises `ApiError`."""
        path = scope["path"]
        if path in PUBLIC:
            if not await self._is_open(path):
                _refuse_strangers(scope)
            return None
        if not await self._known.any(fresh=True):
            _refuse_strangers(scope)
            return Caller(OPERATOR, ALL_SCOPES)
        key = _key_of(scope)
        found = await self._known.find(key.id)
        # Always compared: a key that does not exist takes as long as one whose secret is wrong.
        matches = key.has_hash(_NO_HASH if found is None else found.hash)
        if found is None or not matches:
            raise _unauthorized("this API key is not valid")
        if found.view.status != "live":
            raise _unauthorized(f"this API key is {found.view.status}")
        needed = needed_scope(scope["method"], path)
        if needed not in found.granted:
            raise ApiError(403, f"this API key lacks the scope {needed}", code="insufficient_permissions")
        return Caller(Owner(found.view.tenant, found.view.id), found.granted)

    async def _is_open(self, path: str) -> bool:
        """Whether a public route answers strangers: once there are keys. /health must not wait for the database,
        and takes what was last heard."""
        try:
            return await self._known.any(fresh=path != "/health")
        except NO_DATABASE:
            return False


def _refuse_strangers(scope: Scope) -> None:
    """Without keys, only this machine, under a name of its own.

    A web page can make its own name mean 127.0.0.1 and then read every answer (DNS rebinding). The browser
    still sends that page's name as Host, and this is where it shows.
    """
    client = scope.get("client")
    if client is not None and not is_loopback(client[0]):
        raise _unauthorized("this server has no API keys yet, and answers only its own machine")
    host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if not is_loopback(name):
        message = "without API keys this server answers only under a loopback name; see `nightpress keys`"
        raise ApiError(421, message, code="misdirected_request", param="host")


def _key_of(scope: Scope) -> KeyText:
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if not given:
        raise _unauthorized("an API key is required: send it as `Authorization: Bearer np_…`")
    scheme, _, text = given[0].decode("latin-1").strip().partition(" ")
    if len(given) > 1 or scheme.lower() != "bearer":
        raise _unauthorized("the API key must be sent once, as `Authorization: Bearer np_…`")
    try:
        return parse_key(text.strip())
    except BadKey as error:
        raise _unauthorized(str(error)) from None


def _unauthorized(message: str) -> ApiError:
    headers = {"WWW-Authenticate": "Bearer", "x-should-retry": "false"}
    return ApiError(401, message, code="invalid_api_key", headers=headers)
