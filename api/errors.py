"""Errors: every refusal and every failure leaves this service in OpenAI's envelope.

Owns `{"error": {"message", "type", "param", "code"}}`, the mapping of exceptions to status codes, and the
`x-request-id` header by which a client's report is found in the log. An unforeseen exception is logged under
that id by its kind and place; its text is shown to nobody, because it may hold a prompt or a password.
"""

from __future__ import annotations

import logging
import math
import secrets
import traceback
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.bad_field import BadField, in_plain_words
from jobs.database import cause
from jobs.files import FileInUse
from jobs.forecasts import WindowTooTight
from jobs.idempotency import KeyReusedError
from jobs.openai_answers import error_object
from jobs.quotas import QuotaExceeded
from jobs.retries import NothingToRetry

log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 60.0
NO_DATABASE = (OperationalError, InterfaceError, PoolTimeoutError)


class ApiError(Exception):
    """A refusal with a status code. `param` names the field, `code` is stable and machine readable."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers = headers
        self.status = status
        self.message = message
        self.code = code
        self.param = param


def shown_name(name: str) -> str:
    """Of a field or parameter that a client has made up."""
    return name[:80].encode("utf-8", "backslashreplace").decode()


def not_found(noun: str, name: str) -> ApiError:
    return ApiError(404, f"there is no {noun} {name[:80]!a}", code="not_found", param=f"{noun}_id")


def model_not_found(name: str) -> ApiError:
    message = f"the model {name[:80]!a} is not served here"
    return ApiError(404, message, code="model_not_found", param="model")


def no_such_file(name: str, *, param: str = "file_id") -> ApiError:
    """In OpenAI's words, which programs look for."""
    shown = name[:80].encode("unicode_escape").decode()
    return ApiError(404, f"No such File object: {shown}", code="not_found", param=param)


def envelope(
    status: int,
    message: str,
    *,
    code: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_object(status, message, code=code, param=param), status, dict(headers or {}))


def new_request_id() -> str:
    return "req_" + secrets.token_hex(12)


def install(app: FastAPI) -> None:
    """Make `app` answer in the envelope, whatever happens."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(BadField, _bad_field)
    app.add_exception_handler(QuotaExceeded, _too_much)
    app.add_exception_handler(WindowTooTight, _too_much)
    app.add_exception_handler(KeyReusedError, _key_reused)
    app.add_exception_handler(NothingToRetry, _nothing_to_retry)
    app.add_exception_handler(FileInUse, _file_in_use)
    app.add_exception_handler(RequestValidationError, _bad_query)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in NO_DATABASE:
        app.add_exception_handler(kind, _no_database)
    app.add_middleware(RequestIds)


def _api_error(request: Request, error: Any) -> JSONResponse:
    return envelope(error.status, error.message, code=error.code, param=error.param, headers=error.headers)


def _key_reused(request: Request, error: Any) -> JSONResponse:
    return envelope(
        422, error.message, code=error.code, param="idempotency-key", headers={"x-should-retry": "false"}
    )


def _nothing_to_retry(request: Request, error: Any) -> JSONResponse:
    return envelope(409, error.message, code=error.code, headers={"x-should-retry": "false"})


def _file_in_use(request: Request, error: Any) -> JSONResponse:
    return conflict(error.message, code=error.code)


def conflict(message: str, *, code: str) -> JSONResponse:
    """What stands against it will not go away by itself soon: OpenAI's clients would try 409 again."""
    return envelope(409, message, code=code, headers={"x-should-retry": "false"})


def _bad_field(request: Request, error: Any) -> JSONResponse:
    return envelope(400, str(error), code=error.code, param=error.param)


def _too_much(request: Request, error: Any) -> JSONResponse:
    """Whether to try again is said in OpenAI's two headers; their clients wait for a minute at most."""
    wait = error.retry_after
    headers = {} if wait is None else {"Retry-After": str(math.ceil(wait))}
    if wait is None or wait > LONGEST_WAIT_SECONDS:
        headers["x-should-retry"] = "false"
    return envelope(429, error.message, code=error.code, param=error.param, headers=headers)


def _bad_query(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    unknown = first["type"] == "extra_forbidden"
    param = BadField(".".join(str(part) for part in first["loc"][1:]), "").param
    message = "unknown query parameter" if unknown else in_plain_words(first["msg"])
    code = "unknown_parameter" if unknown else "invalid_value"
    return envelope(400, f"{param}: {message}", code=code, param=param)


def _http_error(request: Request, error: Any) -> JSONResponse:
    match error.status_code:
        case 404:
            message = f"there is no route {shown_name(request.scope['path'])}"
            return envelope(404, message, code="not_found", headers=error.headers)
        case 405:
            allowed = ", ".join(_allowed_methods(request))
            message = f"{request.method} is not allowed here, only {allowed}"
            return envelope(405, message, code="method_not_allowed", headers={"Allow": allowed})
        case status:
            return envelope(status, str(error.detail), code="invalid_request", headers=error.headers)


def _allowed_methods(request: Request) -> list[str]:
    """Of this path. Of several routes that share it, the framework names only the first one's."""
    found = [
        method
        for method in ("GET", "POST", "PATCH", "DELETE")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.router.routes
        )
    ]
    return [*found, "HEAD"] if "GET" in found else found


def _no_database(request: Request, error: Any) -> JSONResponse:
    return database_unreachable(request.scope, error)


def database_unreachable(scope: Scope, error: Exception) -> JSONResponse:
    request_id = scope["state"]["request_id"]
    log.error("api.database_unreachable request=%s error=%s", request_id, cause(error))
    message = "the database cannot be reached at the moment; try again"
    return envelope(503, message, code="database_unreachable", headers={"Retry-After": "2"})


class RequestIds:
    """ASGI: gives each request an id, and turns what nobody caught into a plain 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.info("api.client_left request=%s", request_id)
        except Exception as error:
            # Where, not what: the text of an exception may hold the very values that it is about.
            place = "".join(traceback.format_tb(error.__traceback__))
            kind = type(error).__name__
            log.error(
                "api.failed request=%s method=%s error=%s\n%s", request_id, scope["method"], kind, place
            )
            if started:
                raise  # the client must see a broken answer, not a short one
            answer = envelope(500, f"internal error, see the log for {request_id}", code="internal_error")
            await answer(scope, receive, send_with_id)
