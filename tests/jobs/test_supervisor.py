"""EngineSupervisor: a machine that cannot start another process makes it give up loudly, not fall silent; an engine
that hangs is ended in a known time, even where the kernel cannot end it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from engine.config import EngineConfig
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from jobs import supervisor as module
from jobs.engine_process import EngineProcess
from jobs.supervisor import EngineSupervisor
from tests.support.taps import Tap
from tests.support.tiny import write_tiny_llama
from tests.support.waiting import wait_until

PROGRAM = """
import os, resource, threading
from engine.config import EngineConfig
from jobs.supervisor import EngineSupervisor

given_up = threading.Event()
nothing = lambda *arguments: None
supervisor = EngineSupervisor(
    EngineConfig(model="tiny"), on_ready=nothing, on_completions=nothing, on_progress=nothing,
    on_grown=nothing, on_streamed=nothing, on_death=nothing, on_hopeless=lambda reason: given_up.set(),
)
highest = max(int(name) for name in os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, highest + 1))  # no descriptor is left for a pipe
supervisor.start()
print("gave up" if given_up.wait(20) else "silent", supervisor.num_starts)
"""


def test_starts_that_fail_are_tried_again_and_then_given_up() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout.split() == ["gave", "up", "3"], ran.stderr


class Stuck(EngineProcess):
    """As one that hangs in a driver: SIGKILL stays pending, and nothing comes of it."""

    def kill(self) -> None:
        pass


Death = tuple[int, tuple[RequestId, ...], bool]


class Watched(EngineSupervisor):
    def __init__(self, folder: Path) -> None:
        self.deaths: list[Death] = []
        self.num_done = 0
        self.num_ready = 0
        self.hopeless: list[str] = []
        super().__init__(
            EngineConfig(model=str(folder), kv_cache_memory_bytes=1 << 26, max_num_seqs=2, threads=1),
            on_ready=self.count_ready,
            on_completions=self.count,
            on_progress=lambda progress: None,
            on_grown=lambda growths: None,
            on_streamed=lambda growths: None,
            on_death=lambda *death: self.deaths.append(death),
            on_hopeless=self.hopeless.append,
        )

    def count_ready(self, hello: object) -> None:
        self.num_ready += 1

    def count(self, completions: object) -> None:
        self.num_done += 1


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(write_tiny_llama(tmp_path / "tiny", max_position=100_000))
    made.start()
    yield made
    made.stop()


def request(name: str, max_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0, seed=1, max_tokens=max_tokens, ignore_eos=True)
    return Request(id=RequestId(name, 1), prompt_token_ids=(5, 6), sampling=sampling)


def unkillable(supervisor: Watched, monkeypatch: pytest.MonkeyPatch) -> tuple[EngineProcess, psutil.Process]:
    """The engine, once it is loaded, and the process that only the test can end."""
    wait_until(lambda: supervisor.room, "it is loaded", 60)
    process = supervisor._process
    assert process is not None
    monkeypatch.setattr(process, "__class__", Stuck)
    return process, psutil.Process(process.pid)


def test_an_engine_that_hangs_and_cannot_be_killed_counts_as_dead(
    supervisor: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs are handed on, another engine is started, and neither that nor the end of the worker waits for it."""
    first, hung = unkillable(supervisor, monkeypatch)
    supervisor.add([request("a", 90_000)])
    hung.suspend()
    try:
        supervisor.kill_if_stalled(60.0, 60.0)
        assert not supervisor.deaths, "it is not late yet"
        supervisor.kill_if_stalled(0.0, 60.0)
        supervisor.kill_if_stalled(0.0, 60.0)
        assert not supervisor.deaths, "it has a while to end"
        monkeypatch.setattr(module, "KILL_SECONDS", 0.0)
        supervisor.kill_if_stalled(0.0, 60.0)
        assert supervisor.deaths == [(-signal.SIGKILL, (RequestId("a", 1),), True)]
        wait_until(lambda: supervisor.room and supervisor._process is not first, "another is loaded", 60)
        supervisor.add([request("a", 3)])
        wait_until(lambda: supervisor.num_done == 1, "it computes", 60)
    finally:
        hung.kill()
    assert first.wait_exit(30) == -signal.SIGKILL
    assert supervisor.num_starts == 2
    assert len(supervisor.deaths) == 1, "its late end is no second one"


def test_a_stop_does_not_wait_for_an_engine_that_cannot_be_killed(
    supervisor: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, hung = unkillable(supervisor, monkeypatch)
    monkeypatch.setattr("jobs.engine_process._LAST_SECONDS", 0.2)
    hung.suspend()
    try:
        assert process.stop(0.1) == -signal.SIGKILL
    finally:
        hung.kill()
    assert process.wait_exit(30) == -signal.SIGKILL


def test_a_stop_leaves_no_engine_that_was_just_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, started = Watched(write_tiny_llama(tmp_path / "tiny")), list[EngineProcess]()
    outer = EngineProcess.start

    def start(process: EngineProcess) -> None:
        made._stopping.set()  # as `stop` does, which sees no process that lives
        outer(process)
        started.append(process)

    monkeypatch.setattr(EngineProcess, "start", start)
    made.start()
    made.join(60)
    assert not made.is_alive()
    assert [process.alive for process in started] == [False]


@pytest.fixture
def broken_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tap:
    tap = Tap(tmp_path / "tap")
    for name, value in tap.environment.items():
        monkeypatch.setenv(name, value)
    tap.break_device()
    return tap


def test_an_engine_that_loads_and_dies_of_every_first_step_is_never_ready(
    broken_device: Tap, supervisor: Watched
) -> None:
    """So no job meets it, and none can be taken for what killed it."""
    wait_until(lambda: supervisor.hopeless, "it is given up", 120)
    assert supervisor.hopeless == ["the engine process died while loading, or of its first steps"]
    assert (supervisor.num_starts, supervisor.num_ready, supervisor.room) == (3, 0, 0)
    assert supervisor.deaths == [(7, (), False)] * 3


def test_a_first_step_that_hangs_is_not_given_the_time_of_a_start(
    broken_device: Tap, supervisor: Watched
) -> None:
    broken_device.break_device("hangs")
    wait_until(lambda: supervisor._process and supervisor._process.proved_at, "it is loaded", 60)
    supervisor.kill_if_stalled(60.0, 0.0)
    assert not supervisor.deaths, "it is not late yet"
    supervisor.kill_if_stalled(0.0, 3600.0)
    wait_until(lambda: supervisor.deaths, "it is ended", 30)
    assert supervisor.deaths == [(-signal.SIGKILL, (), True)]
    assert supervisor.num_ready == 0
