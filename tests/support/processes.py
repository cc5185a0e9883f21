"""Real processes of the service: `nightpress api`, `nightpress worker`, `nightpress up`.

Owns their start with a given environment, their logs, and their certain end: each has a process group of its own that
is killed at teardown, and the kernel kills it when the test run itself dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.servers import TIED
from tests.support.tree import ROOT

PYTHON = (sys.executable, "-m", "api.cli")


class Process:
    """One command of the service. Start it from the main thread (see tied.py)."""

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        tie = [sys.executable, "-I", str(TIED), str(os.getpid()), str(int(signal.SIGKILL)), str(os.getuid())]
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*tie, *PYTHON, *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """To this process alone, not to its children."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to this process alone, as the kernel's out-of-memory killer would."""
        self.popen.kill()
        self.popen.wait()

    def terminate(self, timeout: float) -> int:
        """SIGTERM, and the exit status."""
        self.popen.terminate()
        return self.wait(timeout)

    def wait(self, timeout: float) -> int:
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended within {timeout:g} s\n{self.tail()}") from None

    def destroy(self) -> None:
        """Kill whatever is left of its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, num_lines: int = 60) -> str:
        lines = self.text().splitlines()[-num_lines:]
        return f"--- {self.name} (pid {self.pid}, exit status {self.popen.poll()}) ---\n" + "\n".join(lines)
