"""Metrics of the queue and of a worker: right numbers, bounded labels, a text that Prometheus reads."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import pytest
from sqlalchemy import event, update

from jobs import queue_metrics
from jobs.body import JobBody
from jobs.claims import claim
from jobs.database import Database
from jobs.engine_figures import EngineFigures
from jobs.exposition import CollectorRegistry, serve, text_of
from jobs.intake import Intake
from jobs.leases import register
from jobs.models import Job, Worker
from jobs.outcomes import Outcome, Recorded, record
from jobs.queue_metrics import QueueMetrics
from jobs.settings import Settings
from jobs.states import JobState, WorkerState
from jobs.tenants import OPERATOR, Owner
from jobs.terms import Tier
from jobs.worker_metrics import WorkerMetrics
from tests.support.scrape import Samples, samples_of, value_of


def scrape(collector: QueueMetrics) -> Samples:
    registry = CollectorRegistry()
    registry.register(collector)
    return samples_of(text_of(registry).decode())


@pytest.fixture
def queue(database: Database, settings: Settings) -> QueueMetrics:
    """Three jobs of the served model, in two tiers, one of them held; 30 of models that nobody serves."""
    intake = Intake(database, settings)
    with database.write() as connection:
        register(connection, worker_id="worker_secret", model="tiny", lease_seconds=60)
        register(connection, worker_id="worker_lost", model="old", lease_seconds=-1)
        connection.execute(
            update(Worker)
            .where(Worker.id == "worker_secret")
            .values(state=WorkerState.READY, tokens_per_second=2.5)
        )
    ids = [intake.accept_one(JobBody(prompt="x"), Owner("default", "key_secret")) for _ in range(3)]
    for i in range(30):
        intake.accept_one(JobBody(prompt="x", model=f"nonsense {i}"), OPERATOR)
    with database.write() as connection:
        claim(connection, worker_id="worker_secret", model="tiny", limit=1)
        connection.execute(update(Job).where(Job.id == ids[2]).values(tier=int(Tier.BACKGROUND)))
    return QueueMetrics(database, "tiny")


def test_what_waits_and_runs(queue: QueueMetrics) -> None:
    found = scrape(queue)
    depth = {
        (labels["model"], labels["tier"]): value
        for (name, pairs), value in found.items()
        if name == "nightpress_queue_depth" and (labels := dict(pairs))
    }
    zeros = {(model, tier.name.lower()): 0.0 for model in ("tiny", "old") for tier in Tier}
    assert depth == zeros | {
        ("tiny", "normal"): 1,
        ("tiny", "background"): 1,
        ("other", "normal"): 30,
    }
    assert value_of(found, "nightpress_jobs_running") == 1
    assert value_of(found, "nightpress_workers", model="tiny", state="ready") == 1
    assert value_of(found, "nightpress_workers", model="old") == 0
    assert value_of(found, "nightpress_tokens_per_second", model="tiny") == 2.5
    assert value_of(found, "nightpress_database_up") == 1
    assert "secret" not in str(found)
    assert "nonsense" not in str(found)


def test_scraping_often_asks_rarely(
    queue: QueueMetrics, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    event.listen(
        database.engine,
        "before_cursor_execute",
        lambda *args: asked.append(args[2]) if "SELECT" in args[2] else None,
    )
    for _ in range(50):
        scrape(queue)
    assert len(asked) <= 4
    monkeypatch.setattr(queue_metrics, "CACHE_SECONDS", 0.0)
    monkeypatch.setattr(queue_metrics, "_SHARE", 0)
    fresh = QueueMetrics(database, "tiny")
    scrape(fresh)
    before = len(asked)
    scrape(fresh)
    assert len(asked) == before + 4


def test_a_database_that_is_away_is_a_gauge(tmp_path: Any) -> None:
    away = Database("postgresql+psycopg://nobody@127.0.0.1:1/nothing")
    assert list(scrape(QueueMetrics(away)).items()) == [(("nightpress_database_up", ()), 0.0)]
    away.close()


def metrics_of(figures: EngineFigures, num_starts: int = 1) -> WorkerMetrics:
    return WorkerMetrics(
        "tiny",
        figures=lambda: figures,
        is_up=lambda: True,
        num_starts=lambda: num_starts,
        num_held=lambda: 7,
    )


def test_figures_of_the_engine_have_vllms_names() -> None:
    now: dict[str, int | float] = {
        "num_running": 3,
        "num_waiting": 4,
        "num_pages": 100,
        "num_free_pages": 20,
        "num_cached_pages": 30,
        "num_prompt_tokens": 10,
        "num_cached_tokens": 5,
        "num_generated_tokens": 1000,
        "num_preemptions": 2,
        "num_draft_tokens": 40,
        "num_accepted_tokens": 30,
        "num_steps": 50,
        "busy_seconds": 1.5,
    }
    first = EngineFigures(now, {})
    died = first.after_death()
    assert died.now == {}
    again = EngineFigures({"num_generated_tokens": 1}, died.after_death().before)
    for figures, starts, generated, usage in (
        (first, 1, 1000, 0.5),
        (died, 1, 1000, 0.0),
        (again, 2, 1001, 0.0),
    ):
        found = samples_of(text_of(metrics_of(figures, starts).registry).decode())
        assert value_of(found, "vllm:generation_tokens_total", model_name="tiny") == generated
        assert value_of(found, "vllm:kv_cache_usage_perc", model_name="tiny") == usage
        assert value_of(found, "vllm:prompt_tokens_total", model_name="tiny") == 10
        assert value_of(found, "vllm:prefix_cache_queries_total") == 10
        assert value_of(found, "vllm:prefix_cache_hits_total") == 5
        assert value_of(found, "vllm:num_preemptions_total") == 2
        assert value_of(found, "vllm:spec_decode_num_draft_tokens_total", model_name="tiny") == 40
        assert value_of(found, "vllm:spec_decode_num_accepted_tokens_total", model_name="tiny") == 30
        assert value_of(found, "nightpress_engine_restarts_total", model="tiny") == starts - 1
        assert value_of(found, "vllm:num_requests_running") == figures.now.get("num_running", 0)
        assert value_of(found, "vllm:num_requests_waiting") == figures.now.get("num_waiting", 0)
        assert value_of(found, "nightpress_worker_up") == 1
        assert value_of(found, "nightpress_jobs_held") == 7


def test_what_a_worker_has_written(database: Database, settings: Settings) -> None:
    intake = Intake(database, settings)
    with database.write() as connection:
        register(connection, worker_id="w", model="tiny", lease_seconds=60)
    ids = [intake.accept_one(JobBody(prompt="x"), OPERATOR) for _ in range(4)]
    with database.write() as connection:
        connection.execute(update(Job).values(created_at=Job.created_at - 100))
        connection.execute(update(Job).where(Job.id == ids[0]).values(not_before=Job.created_at + 90))
        claims = {one.job_id: one for one in claim(connection, worker_id="w", model="tiny", limit=4)}
        connection.execute(update(Job).where(Job.id == ids[2]).values(state=JobState.CANCELLING))
    outputs = [{"index": i, "text": "a", "finish_reason": ("stop", "length")[i]} for i in range(2)]
    kinds = dict(zip(ids, ("completed", "failed", "completed", "released"), strict=True))
    outcomes = [
        Outcome(
            job_id=job_id,
            fence=claims[job_id].fence,
            kind=kind,  # type: ignore[arg-type]
            outputs=outputs,
            error={"code": "x", "message": "y"},
            prompt_tokens=5,
            completion_tokens=7,
            cached_tokens=2,
        )
        for job_id, kind in kinds.items()
    ]
    stale = Outcome(job_id=ids[3], fence=9, kind="completed", outputs=outputs)
    metrics = metrics_of(EngineFigures({}, {}))
    for group in (outcomes, [stale]):
        recorded = database.transact(lambda c, group=group: record(c, worker_id="w", outcomes=group))
        metrics.recorded(recorded)
    metrics.lost_lease()
    found = samples_of(text_of(metrics.registry).decode())
    for state in ("completed", "failed", "cancelled"):
        assert value_of(found, "nightpress_jobs_total", model="tiny", state=state) == 1
    for kind, number in (("prompt", 5), ("completion", 7), ("cached", 2)):
        assert value_of(found, "nightpress_billed_tokens_total", type=kind) == number, (
            "once: of the completed"
        )
    for reason in ("stop", "length", "error", "abort"):
        assert value_of(found, "vllm:request_success_total", finished_reason=reason) == 1
    assert value_of(found, "vllm:request_success_total", finished_reason="repetition") == 0
    assert value_of(found, "nightpress_job_queue_seconds_count") == 3, "not the one that was handed back"
    assert value_of(found, "nightpress_job_queue_seconds_bucket", le="60.0") == 1, "from not_before on"
    assert value_of(found, "nightpress_job_queue_seconds_bucket", le="300.0") == 3
    assert 200 < value_of(found, "nightpress_job_e2e_seconds_sum") < 300
    assert value_of(found, "nightpress_stale_outcomes_total") == 1
    assert value_of(found, "nightpress_lease_lost_total") == 1
    assert not [text for text in ids if text in str(found)]
    metrics.recorded([Recorded(outcomes[0], JobState.COMPLETED)])  # of an earlier try of the same transaction
    again = samples_of(text_of(metrics.registry).decode())
    assert value_of(again, "nightpress_jobs_total", state="completed") == 2
    assert value_of(again, "nightpress_job_e2e_seconds_count") == 3


def test_the_port_of_a_worker() -> None:
    metrics = metrics_of(EngineFigures({}, {}))
    assert serve(metrics.registry, Settings()) is None
    server = serve(metrics.registry, Settings(metrics_port=0))
    assert server is not None
    try:
        answer = httpx.get(f"http://127.0.0.1:{server.port}/metrics", trust_env=False)
        assert answer.status_code == 200
        assert value_of(samples_of(answer.text), "nightpress_worker_up") == 1
        assert serve(metrics.registry, Settings(metrics_port=server.port)) is None, (
            "taken, and no reason to die"
        )
    finally:
        server.stop()
    with pytest.raises(OSError):  # noqa: PT011 - refused, by whatever name
        socket.create_connection(("127.0.0.1", server.port), 1)
