"""HEAD: what GET would say, without its body.

Owns one ASGI layer next to the routes, which declare GET alone. Whoever watches a service asks this way (`/health`,
how long a file is), and HTTP wants it of every server (RFC 9110, 9.1). Knows no route. A body that is streamed
is left as soon as it begins.
"""

from __future__ import annotations

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    """ASGI. Outer layers see HEAD, routes see GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        inner = {**scope, "method": "GET"}
        enough = False

        async def send_head(message: Message) -> None:
            nonlocal enough
            if message["type"] != "http.response.body":
                await send(message)
                return
            streams = message.get("more_body", False)
            if not enough:
                enough = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            if streams:
                raise _Enough

        try:
            await self._app(inner, receive, send_head)
        except (_Enough, ClientDisconnect):  # what a stream makes of the former depends on the server
            if not enough:
                raise
        finally:
            if "route" in inner:
                scope["route"] = inner["route"]  # by which requests are counted


class _Enough(OSError):
    """Ends a stream, as a client that has left does."""
