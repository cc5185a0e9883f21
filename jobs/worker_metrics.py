"""Worker metrics: what one worker and its engine have done, for Prometheus.

Owns the registry of a worker process. Figures of the engine have vLLM's names, so that dashboards made for it work;
they are read at scrape from what the engine last told (once a second), and go on growing across engine restarts.
Ours count jobs and billed tokens after their commit, so over a worker's life they equal what it wrote into SQL.
Labels: the one model that this worker serves, states, reasons.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client import Counter, Histogram

from jobs.engine_figures import EngineFigures
from jobs.exposition import JOB_SECONDS, Collector, CollectorRegistry, Metric, counter, gauge
from jobs.outcomes import Recorded
from jobs.states import TERMINAL, JobState

# Finish reasons that vLLM has and we give; others, should there ever be any, are counted as `error`.
REASONS: Final = ("stop", "length", "repetition", "abort", "error")


class WorkerMetrics:
    """`figures()` and the other callables are asked at scrape, from any thread."""

    def __init__(
        self,
        model: str,
        *,
        figures: Callable[[], EngineFigures],
        is_up: Callable[[], bool],
        num_starts: Callable[[], int],
        num_held: Callable[[], int],
    ) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._jobs = self._counter("nightpress_jobs", "Jobs that this worker ended, by state.", "state")
        self._tokens = self._counter(
            "nightpress_billed_tokens", "Tokens billed for jobs of this worker; cached are of prompt.", "type"
        )
        self._success = Counter(
            "vllm:request_success",
            "Samples that ended, by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._queued = self._histogram("nightpress_job_queue_seconds", "From acceptance to the first claim.")
        self._lasted = self._histogram("nightpress_job_e2e_seconds", "From acceptance to the end.")
        self.lease_lost = self._counter("nightpress_lease_lost", "Leases that a sweep took away.")
        self.stale = self._counter("nightpress_stale_outcomes", "Outcomes that came too late to count.")
        for reason in REASONS:  # so that a rate has a zero to start from
            self._success.labels(model, reason)
        for state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED):
            self._jobs.labels(model, state)
        for kind in ("prompt", "completion", "cached"):
            self._tokens.labels(model, kind)
        for plain in (self.lease_lost, self.stale):
            plain.labels(model)
        self.registry.register(_Engine(model, figures, is_up, num_starts, num_held))

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, ("model", *labels), registry=self.registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(name, meaning, ("model",), buckets=JOB_SECONDS, registry=self.registry)

    def recorded(self, group: Sequence[Recorded]) -> None:
        """Count what a transaction has committed."""
        states: collections.Counter[str] = collections.Counter()
        reasons: collections.Counter[str] = collections.Counter()
        tokens: collections.Counter[str] = collections.Counter()
        queued, lasted = self._queued.labels(self._model), self._lasted.labels(self._model)
        for item in group:
            if item.state is None:
                self.stale.labels(self._model).inc()
            if item.state not in TERMINAL:
                continue
            outcome = item.outcome
            states[item.state] += 1
            if item.queue_seconds is not None:
                queued.observe(item.queue_seconds)
            if item.seconds is not None:
                lasted.observe(item.seconds)
            if item.state is JobState.COMPLETED:
                tokens["prompt"] += outcome.prompt_tokens
                tokens["completion"] += outcome.completion_tokens
                tokens["cached"] += outcome.cached_tokens
                reasons.update(output["finish_reason"] for output in outcome.outputs)
            else:
                reasons["abort" if item.state is JobState.CANCELLED else "error"] += 1
        for state, count in states.items():
            self._jobs.labels(self._model, state).inc(count)
        for kind, count in tokens.items():
            self._tokens.labels(self._model, kind).inc(count)
        for reason, count in reasons.items():
            self._success.labels(self._model, reason if reason in REASONS else "error").inc(count)

    def lost_lease(self) -> None:
        self.lease_lost.labels(self._model).inc()


class _Engine(Collector):
    def __init__(
        self,
        model: str,
        figures: Callable[[], EngineFigures],
        is_up: Callable[[], bool],
        num_starts: Callable[[], int],
        num_held: Callable[[], int],
    ) -> None:
        self._model = [model]
        self._figures = figures
        self._is_up = is_up
        self._num_starts = num_starts
        self._num_held = num_held

    def collect(self) -> Iterable[Metric]:
        figures = self._figures()
        for name, meaning, value in self._gauges(figures):
            family = gauge(name, meaning, ["model_name" if name.startswith("vllm:") else "model"])
            family.add_metric(self._model, value)
            yield family
        for name, meaning, value in self._counters(figures):
            count = counter(name, meaning, ["model_name" if name.startswith("vllm:") else "model"])
            count.add_metric(self._model, value)
            yield count

    def _gauges(self, figures: EngineFigures) -> Iterable[tuple[str, str, float]]:
        now = figures.now
        pages = float(now.get("num_pages", 0))
        given = pages - float(now.get("num_free_pages", 0)) - float(now.get("num_cached_pages", 0))
        yield "vllm:num_requests_running", "Sequences that generate.", float(now.get("num_running", 0))
        yield "vllm:num_requests_waiting", "Sequences that wait.", float(now.get("num_waiting", 0))
        yield "vllm:kv_cache_usage_perc", "Share of KV pages in use, 1: all.", given / pages if pages else 0.0
        yield "nightpress_worker_up", "1 while the model is loaded and claims are made.", float(self._is_up())
        yield "nightpress_jobs_held", "Jobs from claim to commit.", float(self._num_held())

    def _counters(self, figures: EngineFigures) -> Iterable[tuple[str, str, float]]:
        total = figures.total
        yield "vllm:prompt_tokens", "Prompt tokens of requests that came in.", total("num_prompt_tokens")
        yield (
            "vllm:generation_tokens",
            "Tokens drawn; those that equal requests share count once.",
            total("num_generated_tokens"),
        )
        yield "vllm:num_preemptions", "Sequences that gave up their pages.", total("num_preemptions")
        yield "vllm:spec_decode_num_draft_tokens", "Tokens guessed.", total("num_draft_tokens")
        yield (
            "vllm:spec_decode_num_accepted_tokens",
            "Guessed tokens that were drawn.",
            total("num_accepted_tokens"),
        )
        yield "vllm:prefix_cache_queries", "Prompt tokens looked up.", total("num_prompt_tokens")
        yield "vllm:prefix_cache_hits", "Prompt tokens found.", total("num_cached_tokens")
        yield "nightpress_engine_steps", "Steps of the engine.", total("num_steps")
        yield "nightpress_engine_busy_seconds", "Time within steps.", total("busy_seconds")
        yield "nightpress_recomputed_tokens", "Tokens computed again.", total("num_recomputed_tokens")
        restarts = max(self._num_starts() - 1, 0)
        yield "nightpress_engine_restarts", "Engine processes after the first.", float(restarts)
