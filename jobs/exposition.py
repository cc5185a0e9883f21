"""Exposition: metrics in Prometheus' text, and the small server that hands them out beside a worker.

Owns the words that all our metrics have in common: buckets, the names of tiers, how a registry becomes text. Every
process makes registries of its own; nothing is kept in the library's global one, so several applications in one
process do not mix. Labels are bounded by what their makers put in: models that are served, states, tiers, routes;
never an id or a tenant. Knows no figure; `jobs.worker_metrics` and the API's own file do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.settings import Settings

log = logging.getLogger(__name__)

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
# From one step of an engine to a long night.
JOB_SECONDS: Final = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 10_800, 43_200)
HTTP_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


def text_of(registry: CollectorRegistry) -> bytes:
    return generate_latest(registry)


def gauge(name: str, meaning: str, labels: Iterable[str] = ()) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, labels=list(labels))


def counter(name: str, meaning: str, labels: Iterable[str] = ()) -> CounterMetricFamily:
    """`name` without its `_total`, which the text gets."""
    return CounterMetricFamily(name, meaning, labels=list(labels))


class MetricsServer:
    """Serves one registry at every path of its own port, on threads of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Raises `OSError` when the port cannot be bound. Port 0 takes a free one."""
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, host, registry)
        self.port: int = self._server.server_port
        log.info("metrics.listening host=%s port=%d", host, self.port)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(registry: CollectorRegistry, settings: Settings) -> MetricsServer | None:
    """The server that the settings ask for. A port that is taken costs the metrics, not the work."""
    host, port = settings.metrics_host, settings.metrics_port
    if port is None:
        return None
    try:
        return MetricsServer(registry, host, port)
    except OSError as error:
        log.error("metrics.cannot_listen host=%s port=%d error=%s", host, port, error.strerror or error)
        return None


__all__ = [
    "CONTENT_TYPE",
    "HTTP_SECONDS",
    "JOB_SECONDS",
    "Collector",
    "CollectorRegistry",
    "Metric",
    "MetricsServer",
    "counter",
    "gauge",
    "serve",
    "text_of",
]
