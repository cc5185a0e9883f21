"""EngineSupervisor: a machine that cannot start another process makes it give up loudly, not fall silent."""

from __future__ import annotations

import subprocess
import sys

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
