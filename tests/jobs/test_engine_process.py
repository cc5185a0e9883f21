"""The worker's end of an engine process: credits, in-flight ids, and an end that is reported exactly once."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.config import EngineConfig
from engine.request import Completion, Request, RequestId
from engine.sampling_params import SamplingParams
from engine.wire import Completions, FromEngine, Hello, Progress, Stats
from jobs.engine_process import EngineGoneError, EngineProcess, NoCreditError
from tests.support.tiny import write_tiny_llama
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
ENDLESS = 90_000  # tokens: minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position=100_000)


class Watched(EngineProcess):
    """Writes down what it hears, in order."""

    def __init__(self, folder: Path | str) -> None:
        self.heard: list[FromEngine | tuple[int, tuple[RequestId, ...]]] = []
        super().__init__(
            EngineConfig(model=str(folder), kv_cache_memory_bytes=1 << 26, max_num_seqs=2, threads=1),
            on_message=self.hear,
            on_exit=lambda code, ids: self.heard.append((code, ids)),
        )

    def hear(self, message: FromEngine) -> None:
        self.heard.append(message)

    @property
    def completions(self) -> dict[str, Completion]:
        batches = [message.completions for message in self.heard if isinstance(message, Completions)]
        return {one.id.job_id: one for batch in batches for one in batch}

    @property
    def stats(self) -> dict[str, int | float]:
        return next((one.values for one in reversed(self.heard) if isinstance(one, Stats)), {})

    @property
    def ends(self) -> list[Any]:
        return [message for message in self.heard if isinstance(message, tuple)]

    @property
    def works(self) -> bool:
        return any(sum(m.num_generated.values()) for m in self.heard if isinstance(m, Progress))


def started(folder: Path) -> Watched:
    made = Watched(folder)
    made.start()
    made.wait_ready(30)
    return made


@pytest.fixture
def engine(folder: Path) -> Iterator[Watched]:
    made = started(folder)
    yield made
    made.kill()
    assert made.wait_exit(10) is not None
    assert len(made.ends) == 1
    assert made.heard[-1] == made.ends[0]


@pytest.fixture(scope="module")
def living(folder: Path) -> Iterator[Watched]:
    """For tests that leave nothing in it."""
    made = started(folder)
    yield made
    made.kill()
    assert made.wait_exit(10) is not None
    assert made.ends == [(-signal.SIGKILL, ())]


def request(name: str, max_tokens: int = 5) -> Request:
    sampling = SamplingParams(temperature=0, seed=1, max_tokens=max_tokens, ignore_eos=True)
    return Request(id=RequestId(name, 1), prompt_token_ids=(5, 6), sampling=sampling)


def ids(*names: str) -> tuple[RequestId, ...]:
    return tuple(RequestId(name, 1) for name in names)


def test_every_request_takes_a_credit_until_it_is_answered(living: Watched) -> None:
    assert living.hello is not None
    assert living.available_credits == living.hello.credits == 8
    living.add([request("a", ENDLESS), request("b")])
    assert ids("a")[0] in living.in_flight
    wait_until(lambda: "b" in living.completions, "b is answered")
    assert (living.available_credits, living.in_flight) == (7, ids("a"))
    living.abort(ids("a"))
    wait_until(lambda: "a" in living.completions, "a is answered")
    assert living.completions["a"].aborted
    assert (living.available_credits, living.in_flight) == (8, ())


def test_nothing_is_told_of_the_canary(engine: Watched) -> None:
    """It is slow, for it comes first: forecasts would go by it."""
    assert isinstance(engine.heard[0], Hello)
    engine.add([request("a")])
    wait_until(lambda: engine.stats.get("num_finished"), "it is counted")
    expected = {"num_prompt_tokens": 2, "num_generated_tokens": 5, "num_computed_tokens": 6, "num_steps": 5}
    assert expected.items() <= engine.stats.items()
    assert list(engine.completions) == ["a"]
    assert engine.stats["num_pages"] == engine.stats["num_free_pages"] + engine.stats["num_cached_pages"]


def test_credits_are_free_when_their_completion_is_told(folder: Path) -> None:
    """Whoever is woken by a completion must find the room it made."""
    seen: list[int] = []
    engine = Watched(folder)
    engine._on_message = lambda message: (  # type: ignore[assignment]
        seen.append(engine.available_credits) if isinstance(message, Completions) else None
    )
    engine.start()
    engine.wait_ready(30)
    engine.add([request("a")])
    wait_until(lambda: seen, "a is answered")
    assert seen == [8]
    assert engine.stop(10) == 0


def test_all_or_none_is_added(living: Watched) -> None:
    with pytest.raises(NoCreditError, match="9 requests for 8 credits"):
        living.add([request(str(number)) for number in range(9)])
    with pytest.raises(ValueError, match="in flight already"):
        living.add([request("twin"), request("twin")])
    assert living.in_flight == ()
    living.add([request("twin", ENDLESS)])
    with pytest.raises(ValueError, match="in flight already"):
        living.add([request("twin")])
    assert living.in_flight == ids("twin")
    living.abort(ids("twin"))
    wait_until(lambda: not living.in_flight, "it is answered")


def test_a_killed_engine_is_reported_once_with_what_was_in_it(engine: Watched) -> None:
    engine.add([request("a", ENDLESS), request("b", ENDLESS)])
    wait_until(lambda: engine.works, "the engine works")
    assert engine.pid is not None
    psutil.Process(engine.pid).send_signal(signal.SIGKILL)
    wait_until(lambda: engine.ends, "the end is noticed", timeout=2)
    assert engine.ends == [(-signal.SIGKILL, ids("a", "b"))]
    assert not engine.alive
    assert (engine.available_credits, engine.in_flight) == (0, ())
    with pytest.raises(EngineGoneError):
        engine.add([request("c")])
    engine.abort(ids("a"))  # nothing to say it to, and no error
    assert engine.stop(1) == -signal.SIGKILL


def test_stop_lets_it_answer_and_end_well(engine: Watched) -> None:
    engine.add([request("a", ENDLESS)])
    assert engine.stop(10) == 0
    assert engine.completions["a"].aborted
    assert engine.ends == [(0, ())]


def test_an_engine_that_hangs_is_killed_when_its_time_is_up(engine: Watched) -> None:
    engine.add([request("a", ENDLESS)])
    assert engine.pid is not None
    psutil.Process(engine.pid).suspend()
    assert engine.stop(0.2) == -signal.SIGKILL
    assert engine.ends == [(-signal.SIGKILL, ids("a"))]


def test_when_a_completion_cannot_be_taken_it_counts_as_in_flight(folder: Path) -> None:
    class Clumsy(Watched):
        def hear(self, message: FromEngine) -> None:
            if isinstance(message, Completions):
                raise OSError("no room on disk")

    engine = Clumsy(folder)
    engine.start()
    engine.wait_ready(30)
    engine.add([request("a"), request("b", ENDLESS)])
    assert engine.wait_exit(10) == -signal.SIGKILL
    ((code, lost),) = engine.ends
    assert code == -signal.SIGKILL
    assert set(lost) == set(ids("a", "b"))


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    engine = Watched(tmp_path)
    engine.start()
    with pytest.raises(EngineGoneError, match=r"needs \*\.safetensors"):
        engine.wait_ready(30)
    assert engine.wait_exit(10) == 1
    assert engine.fatal is not None
    assert engine.fatal.phase == "start"
    assert engine.ends == [(1, ())]


def test_one_object_is_one_life(living: Watched, folder: Path) -> None:
    with pytest.raises(RuntimeError, match="started once"):
        living.start()
    fresh = Watched(folder)
    assert fresh.available_credits == 0
    with pytest.raises(EngineGoneError):
        fresh.add([request("a")])
    with pytest.raises(EngineGoneError):
        fresh.stop(1)


WORKER = """
import sys, threading
from engine.config import EngineConfig
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams
from jobs.engine_process import EngineProcess

config = EngineConfig(model=sys.argv[1], kv_cache_memory_bytes=1 << 26, threads=1)
process = EngineProcess(config, on_message=lambda message: None, on_exit=lambda code, ids: None)
process.start()
process.wait_ready(30)
sampling = SamplingParams(temperature=0, seed=1, max_tokens=90_000, ignore_eos=True)
process.add([Request(id=RequestId("a", 1), prompt_token_ids=(5, 6), sampling=sampling)])
assert not {"torch", "transformers"} & set(sys.modules)
print(process.pid, flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_the_engine_never_outlives_a_killed_worker(folder: Path, hangs: bool) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    with worker.stdout:
        engine = psutil.Process(int(worker.stdout.readline()))
        assert engine.ppid() == worker.pid
        if hangs:
            engine.suspend()
        worker.kill()
        worker.wait()

    def dead() -> bool:
        return not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE

    wait_until(dead, "the engine process is gone", timeout=2)
