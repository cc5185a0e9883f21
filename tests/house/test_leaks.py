"""A run of the tests leaves nothing behind, however it ends: seen on real runs of pytest with two workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import leaks, workers
from tests.support.tree import ROOT
from tests.support.waiting import wait_until

# Starts a server, a process that nobody stops, and says under which mark.
HEAD = """
import os, pathlib, subprocess, sys, threading, warnings
from tests.support import leaks

def started(folder):
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path(folder, os.environ["PYTEST_XDIST_WORKER"]).write_text(os.environ[leaks.MARK])
    return left

def test_one(redis_server_url):
    left = started({folder!r})
"""
WAITS = "    try:\n        threading.Event().wait()\n    finally:\n        left.kill()\n        left.wait()\n"
DIES = "    os.kill(os.getpid(), 9)\n"
WARNS = "    left.kill()\n    left.wait()\n    warnings.warn('not to be overlooked')\n"
FORGETS = "    globals()['kept'] = left\n"

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """pytest on two modules of one test each, which ends as given; with the fixtures and checks of all tests."""

    def start(ending: str) -> subprocess.Popen[str]:
        for name in ("test_a.py", "test_b.py"):
            (tmp_path / name).write_text(HEAD.format(folder=str(tmp_path)) + ending)
        options = ["-p", "tests.conftest", "-n", "2", "--max-worker-restart", "0", "-p", "no:cacheprovider"]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *options, str(tmp_path)],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # What a shell starts in the background ignores Ctrl-C, and so would all its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return start


def look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the run whose tests wrote their marks into `folder` has left; it is removed."""
    (run,) = {path.read_text().removesuffix(f"{path.name}/") for path in folder.glob("gw*")}
    monkeypatch.setenv(leaks.MARK, run)
    return leaks.processes_left() + leaks.files_left()


@pytest.mark.long
def test_an_interrupt(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(WAITS) as run:
        try:
            wait_until(
                lambda: len(list(tmp_path.glob("gw*"))) == 2 or run.poll() is not None, "both wait", 120
            )
            os.killpg(run.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
            output, _ = run.communicate(timeout=120)
        finally:
            run.kill()
    assert run.returncode == pytest.ExitCode.INTERRUPTED, output
    assert look(tmp_path, monkeypatch) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("ending", "told"),
    [
        (DIES, "left behind by the workers"),
        (FORGETS, "left behind by the tests"),
        (WARNS, "not to be overlooked"),
    ],
    ids=["a worker dies", "a process is forgotten", "a warning"],
)
def test_a_failure(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, told: str
) -> None:
    run = start(ending)
    output, _ = run.communicate(timeout=240)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, output
    assert told in output
    assert look(tmp_path, monkeypatch) == []


def test_what_is_dealt_out_by_name_exists() -> None:
    for name in (*workers.SERVICES, *workers.LONGEST[1:]):
        assert (ROOT / name).exists(), name
    assert workers.share_of("tests/story/test_poison.py::test_a[sqlite]") == workers.LONGEST[0]
    assert workers.share_of("tests/house/test_leaks.py::test_b") == "tests/house/test_leaks.py"
