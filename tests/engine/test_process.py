"""The engine process, spoken to in raw frames: what it answers, when it ends, and what it ignores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from engine import wire
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, RequestId
from engine.sampling_params import SamplingParams, StructuredOutputsParams
from engine.wire import FrameReader, FrameWriter, FromEngine, ToEngine
from tests.support.grammars import HOSTILE
from tests.support.tiny import write_tiny_llama
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
T = TypeVar("T", bound=FromEngine)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position=100_000)
    return EngineConfig(model=str(folder), kv_cache_memory_bytes=1 << 26, max_num_seqs=2, threads=1)


class Peer:
    """The other ends of the pipes, held by the test."""

    def __init__(
        self, parent_pid: int | None = None, program: tuple[str, str] = ("-m", "engine.process")
    ) -> None:
        child_read, write_fd = os.pipe()
        read_fd, child_write = os.pipe()
        options = {
            "--read-fd": child_read,
            "--write-fd": child_write,
            "--parent-pid": parent_pid or os.getpid(),
        }
        self.popen = subprocess.Popen(
            [
                sys.executable,
                *program,
                *(str(word) for pair in options.items() for word in pair),
            ],
            pass_fds=(child_read, child_write),
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        os.close(child_read)
        os.close(child_write)
        self.reader, self.writer = FrameReader(read_fd), FrameWriter(write_fd)

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self.writer.write(message)

    def read(self, kind: type[T], until: Callable[[T], bool] = lambda _: True) -> T:
        """The next message of this kind for which `until` holds; others are passed over."""
        while True:
            message = self.reader.read()
            assert message is not None, f"the pipe ended before {kind.__name__}"
            assert kind is wire.Fatal or not isinstance(message, wire.Fatal), message
            if isinstance(message, kind) and until(message):
                return message

    def completions(self, count: int) -> dict[str, Any]:
        got: dict[str, Any] = {}
        while len(got) < count:
            got |= {one.id.job_id: one for one in self.read(wire.Completions).completions}
        return got

    def ends(self) -> int:
        return self.popen.wait(20)

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        self.reader.close()
        self.writer.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def living(config: EngineConfig) -> Iterator[Peer]:
    """For tests that leave it as they found it: idle, with nothing unread but figures."""
    made = Peer()
    made.send(wire.Configure(config))
    made.read(wire.Hello)
    yield made
    made.close()


@pytest.fixture
def ready(peer: Peer, config: EngineConfig) -> Peer:
    peer.send(wire.Configure(config))
    peer.read(wire.Hello)
    return peer


def request(name: str, max_tokens: int = 5, prompt: tuple[int, ...] = (5, 6), **sampling: Any) -> Request:
    params = SamplingParams(temperature=0, seed=1, max_tokens=max_tokens, ignore_eos=True, **sampling)
    return Request(id=RequestId(name, 1), prompt_token_ids=prompt, sampling=params)


ENDLESS = 90_000  # tokens: minutes


def test_one_life(peer: Peer, config: EngineConfig) -> None:
    peer.send(wire.Configure(config), wire.Add((request("early"),)))  # not read before it is loaded
    hello = peer.read(wire.Hello)
    assert (hello.model, hello.pid) == (config.model, peer.popen.pid)
    assert (hello.max_model_len, hello.max_num_seqs, hello.credits) == (100_000, 2, 8)
    assert (hello.vocab_size, hello.page_size, hello.device, hello.dtype) == (320, 16, "cpu", "float32")
    assert set(hello.versions) == {"python", "torch"}

    asked = [request("a", 9), request("b", 7, stop=("e",)), request("bad", prompt=(5, 9999))]
    peer.send(wire.Add(tuple(asked)))
    got = peer.completions(4)
    assert got["bad"].error.code == "invalid_request"
    engine = Engine.load(config)
    for one in (request("early"), *asked[:2]):
        engine.add(one)
    while engine.has_work:
        for expected in engine.step():
            answer = got[expected.id.job_id]  # how much was found in memory depends on when each arrived
            assert replace(answer, num_cached_tokens=0) == replace(expected, num_cached_tokens=0)
    idle = peer.read(wire.Stats, lambda stats: stats.values["num_finished"] == 3)
    assert idle.values["num_generated_tokens"] == sum(one.num_generated for one in got.values())

    peer.send(wire.Stop())
    assert peer.ends() == 0
    while (last := peer.reader.read()) is not None:
        assert isinstance(last, wire.Stats)


def test_checkpoints_go_on_where_the_one_before_ended(peer: Peer, config: EngineConfig) -> None:
    peer.send(wire.Configure(config, checkpoint_seconds=0.05), wire.Add((request("long", ENDLESS),)))
    length = 0
    for _ in range(5):
        (growth,) = peer.read(wire.Grown).growths
        assert growth.starts == (length,)
        length += len(growth.generated[0].token_ids)
    peer.send(wire.Abort((RequestId("long", 1),)))
    gone = peer.completions(1)["long"]
    assert gone.num_generated == len(gone.generated[0].token_ids) >= length


def test_progress_while_it_works(living: Peer) -> None:
    living.send(wire.Add((request("long", ENDLESS),)))
    living.read(wire.Stats, lambda stats: stats.values["num_requests"] == 1)
    first = living.read(wire.Progress, lambda progress: bool(progress.num_generated)).num_generated
    second = living.read(wire.Progress).num_generated
    assert list(first) == list(second) == [RequestId("long", 1)]
    assert first[RequestId("long", 1)] < second[RequestId("long", 1)]
    living.send(wire.Abort((RequestId("long", 1),)))
    assert living.completions(1)["long"].aborted


def test_abort(living: Peer) -> None:
    living.send(wire.Add((request("gone", ENDLESS), request("stays"))))
    living.send(wire.Abort((RequestId("gone", 1), RequestId("unknown", 1))))
    got = living.completions(2)
    assert got["gone"].aborted
    assert not got["stays"].aborted
    living.send(wire.Add((request("next"),)))
    assert len(living.completions(1)["next"].outputs[0].token_ids) == 5


def form(name: str, **wish: Any) -> Request:
    params = SamplingParams(seed=1, max_tokens=20, structured_outputs=StructuredOutputsParams(**wish))
    return Request(id=RequestId(name, 1), prompt_token_ids=(5, 6), sampling=params)


def test_grammars_compile_beside_the_steps(ready: Peer) -> None:
    """One that cannot be had, one that takes a while, one that is taken back and one that is quick; a request without
    any goes on."""
    kind, source = HOSTILE["a product of unions"]
    asked = [
        form("refused", regex="(?=a)b"),
        form("slow", **{kind: source}),
        form("gone", grammar=HOSTILE["fewer nullable rules"][1]),
        form("quick", choice=("yes", "no")),
    ]
    ready.send(wire.Add((request("other", 100), *asked)), wire.Abort((RequestId("gone", 1),)))
    got = ready.completions(5)
    assert got["refused"].error.code == got["slow"].error.code == "invalid_request"
    assert got["refused"].error.message.startswith("structured_outputs.regex: ")
    assert got["slow"].error.message.startswith("structured_outputs.json: ")
    assert got["gone"].aborted
    assert got["quick"].outputs[0].finish_reason == "stop"
    assert len(got["other"].outputs[0].token_ids) == 100
    ready.read(wire.Stats, lambda stats: stats.values["num_requests"] == 0)
    ready.send(wire.Stop())
    assert ready.ends() == 0


def test_stop_answers_everything(ready: Peer) -> None:
    ready.send(wire.Add(tuple(request(str(number), ENDLESS) for number in range(4))))
    ready.read(wire.Progress)
    ready.send(wire.Stop())
    assert all(one.aborted for one in ready.completions(4).values())
    assert ready.ends() == 0


def test_more_than_the_credits_comes_back(living: Peer) -> None:
    living.send(wire.Add(tuple(request(str(number), ENDLESS) for number in range(10))))
    got = living.completions(2)
    assert set(got) == {"8", "9"}
    assert all(one.aborted for one in got.values())
    living.send(wire.Abort(tuple(RequestId(str(number), 1) for number in range(8))))
    assert set(living.completions(8)) == set("01234567")


def test_signals_for_the_worker_are_not_for_the_engine(living: Peer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        living.popen.send_signal(number)
    living.send(wire.Add((request("after"),)))
    assert not living.completions(1)["after"].aborted


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.long), True])
def test_it_ends_with_its_pipe(ready: Peer, busy: bool) -> None:
    if busy:
        ready.send(wire.Add((request("long", ENDLESS),)))
        ready.read(wire.Progress)
    ready.writer.close()
    assert ready.ends() == 2


def test_it_ends_when_nobody_reads_its_answers(ready: Peer) -> None:
    ready.reader.close()
    with contextlib.suppress(BrokenPipeError):
        ready.send(wire.Add((request("a"),)))
    assert ready.ends() == 2


def test_it_ends_with_its_pipe_while_loading(peer: Peer, config: EngineConfig) -> None:
    peer.send(wire.Configure(config))
    peer.writer.close()
    assert peer.ends() == 2


def test_it_does_not_start_without_its_parent() -> None:
    orphan = Peer(parent_pid=1)
    assert orphan.ends() == 2
    orphan.close()


def test_what_cannot_be_loaded_says_why(peer: Peer) -> None:
    peer.send(wire.Configure(EngineConfig(model="/no/such/model")))
    fatal = peer.read(wire.Fatal)
    assert fatal.phase == "start"
    assert "/no/such/model: no such file or folder" in fatal.reason
    assert peer.ends() == 1


def test_after_an_error_it_does_not_go_on(ready: Peer) -> None:
    """Two requests of one id: their answers could not be told apart."""
    ready.send(wire.Add((request("twin", ENDLESS), request("twin"))))
    fatal = ready.read(wire.Fatal)
    assert fatal.phase == "run"
    assert "in flight" in fatal.reason
    assert ready.ends() == 1


def test_pages_that_contradict_each_other_end_it(config: EngineConfig) -> None:
    """A page is lost from the books of an engine that works; it says so as soon as it has time to look."""
    program = """
from engine.process import main
from engine.pages import PagePool
free = PagePool.free
def lose_one(pool, pages, **how):
    pages = list(pages)
    free(pool, pages[1:], **how)
PagePool.free = lose_one
main()
"""
    peer = Peer(program=("-c", program))
    peer.send(wire.Configure(config), wire.Add((request("a", prompt=tuple(range(5, 40))),)))
    assert peer.completions(1)["a"].error is None
    fatal = peer.read(wire.Fatal)
    assert fatal.phase == "run"
    assert "AssertionError" in fatal.reason
    assert "references" in fatal.reason
    assert peer.ends() == 1
    peer.close()


NONSENSE = {
    "no message": b"\x00\x00\x00\x03abc",
    "no length": b"\xff\xff\xff\xff",
    "no end": wire.encode(wire.Stop())[:-1],
}
LONGER = [pytest.param(name, marks=pytest.mark.long) for name in ("no length", "no end")]


@pytest.mark.parametrize("sent", ["no message", *LONGER])
def test_nonsense_on_the_pipe_ends_it(ready: Peer, sent: str) -> None:
    os.write(ready.writer._file.fileno(), NONSENSE[sent])
    ready.writer.close()
    assert ready.ends() == 2


def test_it_sleeps_without_work(living: Peer) -> None:
    """Blocked in the kernel on all threads, rather than turning in a loop."""
    living.send(wire.Add((request("awake"),)))
    living.completions(1)
    living.read(wire.Stats, lambda stats: stats.values["num_requests"] == 0)
    tasks = Path(f"/proc/{living.popen.pid}/task")

    def switches() -> int:
        lines = [line for task in tasks.iterdir() for line in (task / "status").read_text().splitlines()]
        return sum(int(line.split()[-1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

    seen: list[int] = []

    def still() -> bool:
        seen.append(switches())
        return len(seen) > 10 and len(set(seen[-10:])) == 1

    wait_until(still, "the engine process sleeps")
