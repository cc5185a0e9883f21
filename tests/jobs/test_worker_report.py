"""WorkerReport: what others read in a worker's row is what its engine said last."""

from __future__ import annotations

import pytest

from engine.config import EngineConfig
from engine.wire import Hello
from jobs.engine_figures import EngineFigures
from jobs.supervisor import EngineSupervisor
from jobs.worker_report import WorkerReport


@pytest.fixture
def supervisor() -> EngineSupervisor:
    """One that is never started."""
    return EngineSupervisor(
        EngineConfig(model="tiny"),
        on_ready=lambda hello: None,
        on_completions=lambda completions: None,
        on_progress=lambda num_generated: None,
        on_grown=lambda growths: None,
        on_streamed=lambda growths: None,
        on_death=lambda returncode, ids, stalled: None,
        on_hopeless=lambda reason: None,
    )


def test_a_report_follows_the_engine(supervisor: EngineSupervisor) -> None:
    draining = False
    report = WorkerReport(supervisor, is_draining=lambda: draining)
    first = report.columns()
    assert (first["state"], first["engine_pid"], first["pace"]) == ("starting", None, None)
    assert "last_step_at" not in first, "no step was made yet"

    told = {
        "num_running": 3,
        "num_waiting": 1,
        "num_steps": 5,
        "busy_seconds": 2.0,
        "num_computed_tokens": 80,
    }
    supervisor.figures = EngineFigures(told, {})
    second = report.columns()
    assert (second["num_running"], second["num_waiting"], second["stats"]) == (3, 1, told)
    assert "last_step_at" in second
    assert second["pace"]["tokens_per_second"] == pytest.approx(40.0)
    assert "last_step_at" not in report.columns(), "the same step is no news"
    draining = True
    assert report.columns()["state"] == "draining"


def test_a_context_stays_known_while_an_engine_is_started_again(supervisor: EngineSupervisor) -> None:
    """Forecasts count by it, and a row that has none is taken for one of a worker that never loaded."""
    report = WorkerReport(supervisor, is_draining=lambda: False)
    assert "max_model_len" not in report.columns()
    supervisor.hello = Hello(
        model="tiny",
        pid=1,
        max_model_len=4096,
        num_pages=10,
        page_size=16,
        max_num_seqs=2,
        credits=4,
        vocab_size=100,
        device="cpu",
        dtype="float32",
        kernels="torch",
        deterministic=False,
    )
    told = report.columns()
    assert (told["state"], told["max_model_len"]) == ("ready", 4096)
    supervisor.hello = None
    told = report.columns()
    assert (told["state"], "max_model_len" in told) == ("starting", False)


def test_a_speed_is_taken_between_two_reports(
    supervisor: EngineSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = 100.0
    monkeypatch.setattr("jobs.worker_report.time.monotonic", lambda: moment)
    report = WorkerReport(supervisor, is_draining=lambda: False)
    speeds = []
    for seconds, generated in ((2.0, 100), (0.05, 150), (2.0, 250), (2.0, 20)):
        moment += seconds
        supervisor.figures = EngineFigures({"num_generated_tokens": generated}, {})
        speeds.append(report.columns()["tokens_per_second"])
    assert speeds == pytest.approx([50.0, 0.0, 50.0, 0.0]), "too short a time, and a restart, say nothing"
