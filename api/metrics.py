"""Metrics of the API: what was asked of it and how long that took, and what `jobs.queue_metrics` reads from SQL.

Owns one ASGI layer around everything else, so that refusals of the gate are counted too, and the route `/metrics`. A
route is named by its template, never by an address; what reached none (401, 404) is `unrouted`. Like every route but
the two public ones `/metrics` needs a key with the scope `read` once there are keys.
"""

from __future__ import annotations

import time
from typing import Final

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import BEARER
from api.parameters import refuse_query
from api.schemas import REFUSALS
from jobs.exposition import CONTENT_TYPE, HTTP_SECONDS, Collector, CollectorRegistry, text_of

UNROUTED: Final = "unrouted"
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class ApiMetrics:
    """The registry of one application."""

    def __init__(self, queue: Collector) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(queue)
        self._requests = Counter(
            "nightpress_http_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "nightpress_http_request_seconds",
            "From the request to the last byte of the answer.",
            ("route",),
            buckets=HTTP_SECONDS,
            registry=self.registry,
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class CountRequests:
    """ASGI. An answer that broke off counts with the status that it had, or 499 if none was sent."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status = 499

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        finally:
            route = getattr(scope.get("route"), "path", UNROUTED)
            self._metrics.answered(scope["method"], route, status, time.monotonic() - began)


def routes(metrics: ApiMetrics) -> APIRouter:
    router = APIRouter(
        tags=["health"],
        dependencies=[Depends(BEARER), Depends(refuse_query)],
        responses=REFUSALS,
    )

    @router.get("/metrics", response_class=Response)
    def get_metrics() -> Response:
        """For Prometheus. Workers have their own, see `NIGHTPRESS_METRICS_PORT`."""
        return Response(text_of(metrics.registry), media_type=CONTENT_TYPE)

    return router
